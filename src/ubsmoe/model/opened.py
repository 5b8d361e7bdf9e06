"""Open a base's weights in the way that takes least memory: mapped where its files allow it, prepared first where they do not."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ubsmoe.config import ConfigError, ModelSettings
from ubsmoe.model.checkpoint import FLOAT8, LOAD, READ, cannot_map, check_finite, check_tensors, check_weights
from ubsmoe.model.conventions import find_blocks
from ubsmoe.model.expert_weights import matrix_names
from ubsmoe.model.fused import weight_files
from ubsmoe.model.identity import weights_sha256
from ubsmoe.model.prepare import Preparation, cache, check_stored, mapped, prepared
from ubsmoe.model.presets import in_float8, prepared_format
from ubsmoe.model.quantised import quantise_in_place
from ubsmoe.storage import bases

DIRECT_BYTES = 1 << 30
"""A smaller base is loaded whole and hashed at every start: that takes a second, and a copy of it would help nobody."""


def open_model(place: str | Path, config: Any, settings: ModelSettings, tokenizer: Any = None) -> tuple[Any, str]:
    """The transformers model on the CPU, its experts in the format that is asked for, and the SHA-256 of its plain weights.

    Raises:
        UserError: if the base cannot be opened so; the message says what to change.
    """
    dtype = getattr(torch, settings.dtype)
    with _mappable(place):
        if format := prepared_format(config):
            _check_fit(settings, config, format)
            facts = check_stored(Path(place))
            return mapped(Path(place), skeleton(config, dtype), format), str(facts["sha256"])
        files = checked_files(place, config)
        if not in_float8(config) and sum(file.stat().st_size for file in files) < DIRECT_BYTES:
            return _loaded(place, settings)
        preparation = Preparation(skeleton(config, dtype), files, settings.experts)
        if settings.experts is None and preparation.checkpoint.is_ready:
            return _mapped_as_it_is(place, settings, bases.fingerprint(files, settings.dtype))
        return _prepared(place, settings, preparation, files, tokenizer)


def checked_files(place: str | Path, config: Any) -> list[Path]:
    """The safetensors files of a base; none for a hub id that has others. Raises ConfigError for damaged ones of a folder."""
    if Path(place).is_dir():
        check_weights(Path(place), {FLOAT8} if in_float8(config) else ())
    return weight_files(place)


def skeleton(config: Any, dtype: torch.dtype) -> Any:
    """The model without weights."""
    config = copy.deepcopy(config)
    if prepared_format(config) or in_float8(config):
        del config.quantization_config  # known here alone, or read as plain weights
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **READ).eval()


def _prepared(
    place: str | Path, settings: ModelSettings, preparation: Preparation, files: list[Path], tokenizer: Any
) -> tuple[Any, str]:
    try:
        folder = prepared(preparation, files, settings.dtype, tokenizer)
    except bases.BaseFolderError as error:
        if settings.experts or preparation.checkpoint.scales:
            raise
        logging.getLogger("ubsmoe").warning(
            "%s. Until then the whole base is in memory, %.1f GB in every process", error, preparation.size / 1e9
        )
        return _loaded(place, settings)
    sha256 = str((bases.read_facts(folder) or {})["sha256"])
    if settings.experts:
        return mapped(folder, preparation.skeleton, settings.experts), sha256
    model = _read(folder, settings)
    model._weight_conversions = None  # a merged export has the layout of the hub, as if it had been loaded from there
    return model, sha256


def _read(place: str | Path, settings: ModelSettings) -> Any:
    """What transformers makes of the files, which have to fit the model."""
    model, found = AutoModelForCausalLM.from_pretrained(
        place, dtype=getattr(torch, settings.dtype), use_safetensors=True, **LOAD
    )
    check_tensors(found, settings.base)
    return model


def _loaded(place: str | Path, settings: ModelSettings) -> tuple[Any, str]:
    """All in memory."""
    model = _read(place, settings)
    check_finite(model.named_parameters(), settings.base)
    sha256 = weights_sha256(model)
    if settings.experts:
        for _, experts in find_blocks(model):
            quantise_in_place(experts, matrix_names(experts), settings.experts)
    return model, sha256


def _mapped_as_it_is(place: str | Path, settings: ModelSettings, key: str) -> tuple[Any, str]:
    """Every weight is read, to be hashed and looked at, only when the files are new."""
    model = _read(place, settings)
    sha256 = bases.known_sha256(cache(), key)
    if sha256 is None:
        check_finite(model.named_parameters(), settings.base)
        sha256 = weights_sha256(model)
        bases.remember_sha256(cache(), key, sha256)
    return model, sha256


def _check_fit(settings: ModelSettings, config: Any, format: str) -> None:
    if settings.experts not in (None, format):
        raise ConfigError(
            f'model.experts is "{settings.experts}", but {settings.base} was prepared as "{format}"; leave model.experts out, or '
            "name the base it was made from"
        )
    if (stored := str(config.dtype).removeprefix("torch.")) != settings.dtype:
        raise ConfigError(
            f'model.dtype is "{settings.dtype}", but {settings.base} was prepared in {stored}; leave model.dtype out'
        )


@contextmanager
def _mappable(place: str | Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:
        if not cannot_map(error):
            raise
        raise ConfigError(
            f"model.base: {place} cannot be mapped ({error}); put it, or HF_HOME, on a file system that supports mmap"
        ) from None
