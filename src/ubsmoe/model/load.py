"""Bring in a base: the one that ships, a folder, or a Hugging Face model id."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ubsmoe.config import ConfigError, ModelSettings
from ubsmoe.data.tokens import check_tokenizer
from ubsmoe.model.conventions import UnsupportedModel
from ubsmoe.model.presets import check_place, checked_k_max, quieten
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
        # trust_remote_code stays off: a base is data, never code
        refuse_quantised(AutoConfig.from_pretrained(place), settings.base)
        model = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, settings.dtype))
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
        config = AutoConfig.from_pretrained(place)
    refuse_quantised(config, settings.base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype)).eval()
    return _operated(model, settings, rescale, k_max)


def _operated(model: Any, settings: ModelSettings, rescale: Rescale, k_max: int | None) -> SparseModel:
    sparse = SparseModel(model, rescale)
    sparse.limit_k_max(checked_k_max(k_max, sparse.k_max, settings.base))
    return sparse


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
        return AutoTokenizer.from_pretrained(place)


@contextmanager
def _place_of(settings: ModelSettings) -> Iterator[str | Path]:
    """Where the base lies; whatever fails while it is read becomes one sentence."""
    place = shipped_path(settings.base) or settings.base
    quieten()
    try:
        check_place(place)
        yield place
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model.base: cannot load {settings.base!r} ({reason}); expected ubsmoe-tiny, a folder with a transformers "
            "model, or a model id that the Hugging Face hub can be asked for"
        ) from None


def weights_sha256(model: torch.nn.Module) -> str:
    """One hash over all weights, by name: says which base an adapter belongs to, and that a run left it untouched."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def shipped_path(name: str) -> Path | None:
    """Where a base of that name lies inside the package, if it ships."""
    place = Path(__file__).parent.parent / "assets" / name
    return place if (place / "config.json").is_file() else None
