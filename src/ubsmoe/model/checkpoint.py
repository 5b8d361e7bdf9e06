"""What a model folder may hold, looked at before and after transformers reads it: each fault is one sentence with a name in it.

A base is data, never code: `READ` goes into every call that reads one.
"""

import errno
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
from jaxtyping import Shaped
from torch import Tensor

from ubsmoe.config import ConfigError
from ubsmoe.errors import UserError

READ: dict[str, Any] = {"trust_remote_code": False}
"""No code of a model's author is run, and nobody is asked whether it may be."""

LOAD: dict[str, Any] = {**READ, "ignore_mismatched_sizes": True, "output_loading_info": True}
"""For weights: what is wrong with them comes back as a report, for `check_tensors`."""

OWN_KERNELS = {
    None,
    "eager",
    "sdpa",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "grouped_mm",
    "batched_mm",
}
"""Implementations that are part of transformers, or of a package that this machine's user has installed."""

INDEX = "model.safetensors.index.json"
FLOAT8 = "F8_E4M3"
_PLAIN = {"F64", "F32", "F16", "BF16", "I64", "I32", "BOOL"}
_BEGINNINGS = {
    b"version https://git-lfs": "it is a Git LFS pointer; run `git lfs pull` in the folder",
    b"PK": "it is a PyTorch file under another name; convert it to safetensors",
    b"\x80": "it is a pickle under another name; convert it to safetensors",
}


def cannot_map(error: Exception) -> bool:
    """Whether a file could not be opened because its file system has no mmap: torch says so, safetensors passes on ENODEV."""
    return "mmap" in str(error) or f"os error {errno.ENODEV}" in str(error)


@contextmanager
def one_sentence(word: Callable[[str], str]) -> Iterator[None]:
    """Turn whatever fails inside into a ConfigError: transformers, tokenizers and safetensors raise what they like.

    Args:
        word: from the reason to the sentence.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        lines = str(error).strip().splitlines() or ["no reason given"]
        raise ConfigError(word(kind + lines[0])) from None


def check_weights(folder: Path, known: Collection[str] = ()) -> None:
    """Raise ConfigError for weight files of a local folder that are absent, damaged, no safetensors, or of packed numbers.

    `known` are kinds of numbers that are none by themselves, and are read with their scales.
    """
    index = folder / INDEX
    places = _indexed(index) if index.is_file() else {}
    names = sorted(set(places.values())) or ["model.safetensors"]
    if missing := [name for name in names if not (folder / name).is_file()]:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"it has {pickled[0]}, a pickle, which is never read; convert it" if pickled else "copy the whole folder"
        raise ConfigError(f"model.base: {folder} lacks {named(missing)}; {hint}")
    held = {name: _tensors_of(folder / name, known) for name in names}
    if absent := [tensor for tensor, name in places.items() if tensor not in held[name]]:
        raise ConfigError(
            f"model.base: {index} says that {places[absent[0]]} holds {named(absent)}, but it does not; download the folder again"
        )


def check_tensors(found: Mapping[str, Any], base: str) -> None:
    """Raise ConfigError unless a checkpoint gave every tensor of its model and no others, by transformers' loading report."""
    if sizes := sorted(found["mismatched_keys"]):
        name, held, wanted = sizes[0]
        raise ConfigError(
            f"model.base: {base} does not fit its config.json: {name} has the size {tuple(held)}, expected {tuple(wanted)}"
            f"{f', and {len(sizes) - 1} more tensors differ' if sizes[1:] else ''}; use the config.json that came with the weights"
        )
    for kind, happens in (("missing", "would be drawn at random"), ("unexpected", "would be left out")):
        if names := sorted(found[f"{kind}_keys"]):
            raise ConfigError(
                f"model.base: {base} does not fit its config.json: {kind} tensors {named(names)}, which {happens}; expected every "
                "tensor of the model and no others"
            )


def check_finite(tensors: Iterable[tuple[str, Shaped[Tensor, "*S"]]], base: str) -> None:
    """Raise ConfigError for weights that are not numbers."""
    for name, tensor in tensors:
        if not (good := tensor.isfinite()).all():
            raise ConfigError(
                f"model.base: {base} has {int((~good).sum())} values in {name} that are NaN or infinite; download it again, or "
                'use model.dtype = "float32" if it was saved in that'
            )


def check_kernels(config: Any, base: str) -> None:
    """Raise ConfigError for a configuration that names code for its attention or experts, which transformers would fetch."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for part in ("attn", "experts"):
        wanted = {getattr(one, f"_{part}_implementation_internal", None) for one in parts}
        if foreign := sorted(map(str, wanted - OWN_KERNELS)):
            raise ConfigError(
                f"model.base: {base} asks for {part}_implementation {foreign[0]!r}, and no code that a model folder names is run; "
                f"remove it from its config.json"
            )


def check_rope(config: Any, known: Iterable[str], base: str) -> None:
    """Raise ConfigError for a rotary embedding that the installed transformers does not have."""
    kinds, known = set[str](), {"default", *known}
    _collect(getattr(config.get_text_config(), "rope_parameters", None), kinds)
    if unknown := sorted(kinds - known):
        raise ConfigError(
            f"model.base: {base} asks for rope_type {unknown[0]!r}, which this transformers does not have; "
            f"known: {', '.join(sorted(known))}"
        )


def named(names: list[str]) -> str:
    """The first three, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _collect(rope: Any, kinds: set[str]) -> None:
    """Rope types of a configuration, whose families nest them by kind of layer."""
    for key, value in rope.items() if isinstance(rope, dict) else ():
        if isinstance(value, dict):
            _collect(value, kinds)
        elif key == "rope_type":
            kinds.add(str(value))


def _indexed(index: Path) -> dict[str, str]:
    """The file of every tensor."""
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        if not places or not all(isinstance(name, str) and Path(name).name == name for name in places.values()):
            raise ValueError("weight_map must give a file of this folder for each tensor")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"model.base: {index} cannot be used ({error}); download it again") from None
    return dict(places)


def _tensors_of(path: Path, known: Collection[str]) -> set[str]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        if cannot_map(error):
            raise
        with path.open("rb") as raw:
            start = raw.read(24)
        ours = start[8:9] == b"{"  # where a header begins; the bytes before are its length and may look like anything
        hints = (hint for begin, hint in _BEGINNINGS.items() if not ours and start.startswith(begin))
        reason = next(hints, f"it is truncated or damaged ({error}); download it again")
        raise ConfigError(f"model.base: {path} is no whole safetensors file: {reason}") from None
    if packed := sorted(name for name, kind in kinds.items() if kind not in _PLAIN and kind not in known):
        raise ConfigError(
            f"model.base: {path} holds {named(packed)} as {kinds[packed[0]]}; expected plain weights (float32, bfloat16 or "
            "float16), so use the checkpoint it was made from"
        )
    return set(kinds)
