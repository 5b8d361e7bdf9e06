"""A model's weights as a checkpoint stores them: layer by layer, under the names and in the layout of the family's files."""

import re
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict


def weights_by_layer(model: Any) -> list[dict[str, Tensor]]:
    """The weights of each decoder layer by the model's own names, nothing copied; what lies in none of them comes first."""

    def layer(name: str) -> str:
        found = re.match(r".*?\.\d+\.", name)
        return found[0] if found else ""

    state = remove_tied_weights_from_state_dict(model.state_dict(), model)
    return [{name: state[name] for name in group} for _, group in groupby(sorted(state, key=layer), key=layer)]


def as_stored(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """These weights by the names of a checkpoint, experts one by one where its family stores them so."""
    stored: dict[str, Tensor] = revert_weight_conversion(model, dict(weights))
    return stored
