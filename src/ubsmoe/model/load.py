"""Bring in a base: the one that ships, a folder, or a Hugging Face model id."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ubsmoe import progress
from ubsmoe.config import ConfigError, ModelSettings
from ubsmoe.costs.workload import ExpertFormat
from ubsmoe.data.tokens import check_tokenizer
from ubsmoe.model.checkpoint import READ, check_kernels, check_rope, one_sentence
from ubsmoe.model.conventions import UnsupportedModel
from ubsmoe.model.opened import checked_files, open_model, skeleton
from ubsmoe.model.prepare import Preparation, prepared
from ubsmoe.model.presets import (
    EXPECTED,
    HUB_IDS,
    check_place,
    check_sparse,
    checked_k_max,
    dtype_of,
    in_float8,
    prepared_format,
    quieten,
)
from ubsmoe.model.quantised import format_of
from ubsmoe.model.routing import Rescale
from ubsmoe.model.surgery import SparseModel
from ubsmoe.storage.bases import write_base
from ubsmoe.storage.exportfolder import check_free


def load_base(settings: ModelSettings, rescale: Rescale = "none", k_max: int | None = None) -> tuple[SparseModel, Any]:
    """Load the frozen base and its tokenizer.

    Args:
        settings: [model].
        rescale: scale of a layer's output when K < K_max.
        k_max: [tiers] k_max: fewer experts at budget 1 than the base's own.

    Raises:
        ConfigError: if the base cannot be found, its tokenizer does not fit it, or k_max exceeds the base's own.
        UnsupportedModel: if it is dense or its routers ignore K.
    """
    progress.at(f"loads {settings.base}")
    tokenizer = load_tokenizer(settings)
    with _place_of(settings) as place:
        config = _read_sparse(place, settings.base)
        model, sha256 = open_model(place, config, _with_dtype(settings), tokenizer)
    try:
        # what is quantised keeps parameters without numbers, which cannot be moved
        model = model._apply(lambda t: t if t.is_meta else t.to(settings.device)).eval()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"model.device: {settings.device!r} cannot be used here ({error})") from None
    check_tokenizer(tokenizer, model.get_input_embeddings().num_embeddings)
    sparse = _operated(model, settings, rescale, k_max)
    sparse.sha256 = sha256
    return sparse, tokenizer


class Bases:
    """A base in each format of its experts that is asked for, loaded once.

    What is mapped costs no memory until it is used, so that clients of several formats share a process at little cost.

    Args:
        settings: [model]; of its experts each call says what they are.
        rescale, k_max: as for `load_base`.
    """

    def __init__(self, settings: ModelSettings, rescale: Rescale = "none", k_max: int | None = None) -> None:
        self._place = settings, rescale, k_max
        self._loaded: dict[ExpertFormat | None, SparseModel] = {}
        self.tokenizer: Any = None

    def __call__(self, experts: ExpertFormat | None) -> SparseModel:
        """The base with such experts. Raises UserError as `load_base`, and for a prepared base that has others."""
        if experts not in self._loaded:
            settings, rescale, k_max = self._place
            loaded, self.tokenizer = load_base(settings.model_copy(update={"experts": experts}), rescale, k_max)
            if (found := format_of(loaded.layers[0].experts)) != experts:
                raise ConfigError(
                    f"model.base: {settings.base} was prepared as {found}, and plain experts are asked for; name the base it "
                    f'was made from, or ask for "{found}": in tiers.experts, or a node as model.experts'
                )
            self._loaded[experts] = loaded
        return self._loaded[experts]


def load_skeleton(settings: ModelSettings, rescale: Rescale = "none", k_max: int | None = None) -> SparseModel:
    """The base without its weights, on the meta device: names, shapes and dtypes for whoever only checks or adds up adapters.

    Only the configuration is read, and no memory is taken for weights. Arguments and errors are those of `load_base`.
    """
    with _place_of(settings) as place:
        model = skeleton(_read_sparse(place, settings.base), getattr(torch, dtype_of(settings)))
    return _operated(model, settings, rescale, k_max)


def base_bytes(settings: ModelSettings) -> int:
    """What a base takes in memory with plain experts, of which nothing is read but the configuration."""
    return sum(parameter.nbytes for parameter in load_skeleton(settings).model.parameters())


def _with_dtype(settings: ModelSettings) -> ModelSettings:
    return settings.model_copy(update={"dtype": dtype_of(settings)})


def _operated(model: Any, settings: ModelSettings, rescale: Rescale, k_max: int | None) -> SparseModel:
    sparse = SparseModel(model, rescale)
    sparse.limit_k_max(checked_k_max(k_max, sparse.k_max, settings.base))
    return sparse


def prepare_base(settings: ModelSettings, out: Path | None = None) -> Path:
    """Store a base so that runs map it, in the cache or in a folder that can be taken elsewhere; gives the folder.

    Raises:
        UserError: if there is no such base, it has no safetensors files, or it cannot be written; then nothing is.
    """
    tokenizer, settings = load_tokenizer(settings), _with_dtype(settings)
    with _place_of(settings) as place:
        config = _read_sparse(place, settings.base)
        if prepared_format(config):
            raise ConfigError(f"model.base: {settings.base} is a prepared base already; name the base it was made from")
        if not (files := checked_files(place, config)):
            raise ConfigError(f"model.base: {settings.base} has no safetensors files, and only these can be prepared")
        preparation = Preparation(skeleton(config, getattr(torch, settings.dtype)), files, settings.experts)
        if out is None:
            return prepared(preparation, files, settings.dtype, tokenizer)
        check_free(out)
        write_base(out, preparation.size, lambda folder: preparation.write(folder, tokenizer))
        return out


def read_config(place: str | Path, base: str) -> Any:
    """The configuration at `place`. Raises UserError for one that no model can be built from."""
    config = AutoConfig.from_pretrained(place, **READ)
    refuse_quantised(config, base)
    check_kernels(config, base)
    check_rope(config, ROPE_INIT_FUNCTIONS, base)
    return config


def _read_sparse(place: str | Path, base: str) -> Any:
    config = read_config(place, base)
    check_sparse(config, base)
    return config


def refuse_quantised(config: Any, base: str) -> None:
    """Raise UnsupportedModel for a checkpoint of quantised weights that cannot be read as plain ones."""
    found = getattr(config, "quantization_config", None)
    if found and not prepared_format(config) and not in_float8(config):
        kind = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
        raise UnsupportedModel(
            f"model.base: {base} holds quantised weights ({kind or 'of unknown kind'}), and experts are computed from plain ones; "
            'use the checkpoint it was made from with model.experts = "nf4" or "int8", or a dequantised copy'
        )


def load_tokenizer(settings: ModelSettings) -> Any:
    """The base's tokenizer alone, for whoever looks at data before weights. Raises ConfigError as `load_base` does."""
    with _place_of(settings) as place:
        tokenizer = AutoTokenizer.from_pretrained(place, **READ)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ConfigError(
            f"model.base: {settings.base} has no tokenizer files; copy tokenizer.json beside its config.json"
        )
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ConfigError(
            f"model.base: model_max_length in the tokenizer_config.json of {settings.base} is {tokenizer.model_max_length!r}; "
            "expected a number of tokens"
        )
    return tokenizer


@contextmanager
def _place_of(settings: ModelSettings) -> Iterator[str | Path]:
    """Where the base lies; whatever fails while it is read becomes one sentence."""
    place = shipped_path(settings.base) or HUB_IDS.get(settings.base, settings.base)
    quieten()
    word = f"model.base: cannot load {settings.base!r} (%s); {EXPECTED}"
    with one_sentence(lambda reason: word.replace("%s", reason)):
        check_place(place)
        yield place


def check_sha256(settings: ModelSettings, sha256: str) -> None:
    """Raise ConfigError if model.sha256 asks for another base than the one with this hash."""
    if settings.sha256 not in (None, sha256):
        raise ConfigError(
            f"model.sha256 is {settings.sha256}, but the weights of {settings.base} in {dtype_of(settings)} have {sha256}"
        )


def shipped_path(name: str) -> Path | None:
    """Where a base of that name lies inside the package, if it ships."""
    place = Path(__file__).parent.parent / "assets" / name
    return place if (place / "config.json").is_file() else None
