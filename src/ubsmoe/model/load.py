"""Bring in a base: the one that ships, a folder, or a Hugging Face model id."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ubsmoe.config import ConfigError, ModelSettings
from ubsmoe.data.tokens import check_tokenizer
from ubsmoe.model.checkpoint import LOAD, READ, check_finite, check_rope, check_tensors, check_weights, one_sentence
from ubsmoe.model.conventions import UnsupportedModel
from ubsmoe.model.presets import check_place, check_sparse, checked_k_max, quieten
from ubsmoe.model.routing import Rescale
from ubsmoe.model.surgery import SparseModel


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
    tokenizer = load_tokenizer(settings)
    with _place_of(settings) as place:
        check_sparse(read_config(place, settings.base), settings.base)
        if Path(place).is_dir():
            check_weights(Path(place))
        model, found = AutoModelForCausalLM.from_pretrained(
            place, dtype=getattr(torch, settings.dtype), use_safetensors=True, **LOAD
        )
    check_tensors(found, settings.base)
    check_finite(model.named_parameters(), settings.base)
    try:
        model = model.to(settings.device).eval()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"model.device: {settings.device!r} cannot be used here ({error})") from None
    check_tokenizer(tokenizer, model.get_input_embeddings().num_embeddings)
    return _operated(model, settings, rescale, k_max), tokenizer


def load_skeleton(settings: ModelSettings, rescale: Rescale = "none", k_max: int | None = None) -> SparseModel:
    """The base without its weights, on the meta device: names, shapes and dtypes for whoever only checks or adds up adapters.

    Only the configuration is read, and no memory is taken for weights. Arguments and errors are those of `load_base`.
    """
    with _place_of(settings) as place:
        config = read_config(place, settings.base)
        check_sparse(config, settings.base)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype), **READ).eval()
    return _operated(model, settings, rescale, k_max)


def _operated(model: Any, settings: ModelSettings, rescale: Rescale, k_max: int | None) -> SparseModel:
    sparse = SparseModel(model, rescale)
    sparse.limit_k_max(checked_k_max(k_max, sparse.k_max, settings.base))
    return sparse


def read_config(place: str | Path, base: str) -> Any:
    """The configuration at `place`. Raises UserError for one that no model can be built from."""
    config = AutoConfig.from_pretrained(place, **READ)
    refuse_quantised(config, base)
    check_rope(config, ROPE_INIT_FUNCTIONS, base)
    return config


def refuse_quantised(config: Any, base: str) -> None:
    """Raise UnsupportedModel for a checkpoint of quantised weights: the kernel and every export read plain ones."""
    found = getattr(config, "quantization_config", None)
    if found:
        kind = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
        raise UnsupportedModel(
            f"model.base: {base} holds quantised weights ({kind or 'of unknown kind'}), and experts are computed from plain ones; "
            'use the checkpoint it was made from, or a dequantised copy, with model.dtype = "bfloat16"'
        )


def load_tokenizer(settings: ModelSettings) -> Any:
    """The base's tokenizer alone, for whoever looks at data before weights. Raises ConfigError as `load_base` does."""
    with _place_of(settings) as place:
        tokenizer = AutoTokenizer.from_pretrained(place, **READ)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ConfigError(
            f"model.base: {settings.base} has no tokenizer files; copy tokenizer.json beside its config.json"
        )
    return tokenizer


@contextmanager
def _place_of(settings: ModelSettings) -> Iterator[str | Path]:
    """Where the base lies; whatever fails while it is read becomes one sentence."""
    place = shipped_path(settings.base) or settings.base
    quieten()
    word = (
        f"model.base: cannot load {settings.base!r} (%s); expected ubsmoe-tiny, a folder with a transformers "
        "model, or a model id that the Hugging Face hub can be asked for"
    )
    with one_sentence(lambda reason: word.replace("%s", reason)):
        check_place(place)
        yield place


def weights_sha256(model: torch.nn.Module) -> str:
    """One hash over all weights, by name: says which base an adapter belongs to, and that a run left it untouched."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_sha256(settings: ModelSettings, sha256: str) -> None:
    """Raise ConfigError if model.sha256 asks for another base than the one with this hash."""
    if settings.sha256 not in (None, sha256):
        raise ConfigError(
            f"model.sha256 is {settings.sha256}, but the weights of {settings.base} in {settings.dtype} have {sha256}"
        )


def shipped_path(name: str) -> Path | None:
    """Where a base of that name lies inside the package, if it ships."""
    place = Path(__file__).parent.parent / "assets" / name
    return place if (place / "config.json").is_file() else None
