"""LoRA on the attention projections of the layers that have experts: whatever linear maps a family's attention is made of.

    y = x W^T + bias + s (x A^T) B^T

Every token uses a projection, so it is a mixture of one: its factors are A [1, r, in] and B [1, out, r], and whatever works on
an expert's factors works on them.
"""

import re
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from ubsmoe.model.adapter import MatrixAdapter
from ubsmoe.model.conventions import UnsupportedModel


class AttentionLora:
    """One layer's attention projections by name, and the adapters that are on them now.

    Attributes:
        projections: q_proj, k_proj, ...: the module's own linear maps; none where a layer has no `self_attn`.
        adapters: of some of them, or of none.
    """

    def __init__(self, projections: Mapping[str, nn.Linear]) -> None:
        self.projections = dict(projections)
        self.adapters: dict[str, MatrixAdapter] = {}
        self._hooks: list[Any] = []

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every projection.

        Raises:
            UnsupportedModel: if the layer has none.
        """
        if not self.projections:
            raise UnsupportedModel(
                'this base has a layer with experts but without attention projections (self_attn); set adapter.attention = "frozen"'
            )
        return {name: (module.out_features, module.in_features) for name, module in self.projections.items()}

    def put(self, adapters: Mapping[str, MatrixAdapter], scale: float) -> None:
        """Put these on, in place of what was on before."""
        self.clear()
        self.adapters = dict(adapters)
        self._hooks = [
            self.projections[name].register_forward_hook(_Added(adapter, scale)) for name, adapter in adapters.items()
        ]

    def clear(self) -> None:
        """Take everything off."""
        for hook in self._hooks:
            hook.remove()
        self.adapters, self._hooks = {}, []


class _Added:
    """A forward hook that adds s (x A^T) B^T."""

    def __init__(self, adapter: MatrixAdapter, scale: float) -> None:
        self.adapter, self.scale = adapter, scale

    def __call__(
        self, module: nn.Module, args: tuple[Float[Tensor, "*T in"], ...], out: Float[Tensor, "*T out"]
    ) -> Float[Tensor, "*T out"]:
        a, b = (factor[0].to(out.dtype) for factor in self.adapter.joined())
        return out + self.scale * linear(linear(args[0], a), b)


def find_projections(model: nn.Module, router: nn.Module) -> dict[str, nn.Linear]:
    """The linear maps of the attention in a router's decoder layer."""
    path = next(name for name, module in model.named_modules() if module is router)
    layer = re.match(r".*\.\d+(?=\.)", path)
    attention = getattr(model.get_submodule(layer[0]), "self_attn", None) if layer else None
    children = attention.named_children() if isinstance(attention, nn.Module) else ()
    return {name: module for name, module in children if isinstance(module, nn.Linear)}
