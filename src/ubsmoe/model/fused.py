"""A checkpoint's tensors as the model names them, with experts fused, read piece by piece.

transformers' own conversions say what becomes of which tensor. Those that stack experts are carried out one expert at a time:
the pieces of a fused tensor, one after another, are its bytes.
"""

import copy
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils import cached_file

from ubsmoe.maths.quantise import dequantise_blocks
from ubsmoe.model.checkpoint import INDEX, check_tensors
from ubsmoe.model.conventions import UnsupportedModel
from ubsmoe.model.presets import FLOAT8_BLOCK

SCALES = "_scale_inv"
PIECE = 1 << 24
"""Elements of a piece of a tensor that has no experts."""


def weight_files(place: str | Path) -> list[Path]:
    """The safetensors files of a folder or a hub id, fetched if need be; none if it has other files."""

    def found(name: str) -> Path | None:
        file = cached_file(place, name, _raise_exceptions_for_missing_entries=False)
        return None if file is None else Path(file)

    if index := found(INDEX):
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [found(name) for name in names]
        return [file for file in files if file is not None] if all(files) else []
    single = found("model.safetensors")
    return [single] if single else []


@dataclass(frozen=True)
class Source:
    """Where a tensor of the model comes from: by each pattern of its converter, the checkpoint's names, in order."""

    converter: WeightConverter | None
    names: dict[str, list[str]]

    @property
    def first(self) -> str:
        """The only one, where nothing is converted."""
        return next(iter(self.names.values()))[0]


class Checkpoint:
    """The safetensors files of a base, seen through a model without weights.

    Attributes:
        shapes: of every tensor of the model, without those that are tied to another one.
        tied: name of a tied tensor -> name of the tensor that it is.
        scales: name of a tensor in float8 -> file of its scales; it is read as what both say.

    Raises:
        ConfigError: if the files lack a tensor of the model, or have one too many or of another shape.
    """

    def __init__(self, model: Any, files: Sequence[Path]) -> None:
        self._model = model
        self._file: dict[str, Path] = {}
        self._sizes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                self._file |= dict.fromkeys(file.keys(), path)
                self._sizes |= {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
        self.scales = {name[: -len(SCALES)]: path for name, path in self._file.items() if name.endswith(SCALES)}
        for name in self.scales:
            del self._file[name + SCALES]
        state = model.state_dict()
        self._sources = self._find_sources(state)
        tied = {name: str(other) for name, other in getattr(model, "all_tied_weights_keys", {}).items()}
        self.tied = {name: other for name, other in tied.items() if name in state and name not in self._sources}
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(state[name].shape) for name in state if name not in self.tied
        }
        check_tensors(self._report(), model.config.name_or_path)
        self._dtypes = {name: _dtype_of(model, name, state[name]) for name in self.shapes}

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which the model has a tensor."""
        return self._dtypes[name]

    @property
    def is_ready(self) -> bool:
        """Whether the files can be mapped as they are: nothing is to be converted, in form or in dtype."""
        return not self.scales and all(
            source.converter is None and self._read(source.first).dtype == self.dtype(name)
            for name, source in self._sources.items()
        )

    def pieces(self, name: str) -> Iterator[Shaped[Tensor, "..."]]:
        """A tensor's elements in order: an expert at a time where there are experts, else rows."""
        source, shape, done = self._sources[name], self.shapes[name], 0
        for piece in self._converted(name, source):
            done += piece.numel()
            yield piece.to(self.dtype(name)).contiguous()
        if done != torch.Size(shape).numel():
            raise UnsupportedModel(f"model.base: {name} has {done} elements, and {tuple(shape)} are expected")

    def _converted(self, name: str, source: Source) -> Iterator[Shaped[Tensor, "..."]]:
        shape = self.shapes[name]
        if source.converter is None:
            whole = self._read(source.first)
            yield from whole.reshape(-1).split(PIECE if whole.dim() != 3 else max(1, whole[0].numel()))
        elif len(shape) == 3 and {len(names) for names in source.names.values()} == {shape[0]} and shape[0] > 1:
            for expert in range(shape[0]):
                yield self._convert(name, source, slice(expert, expert + 1))
        else:
            yield self._convert(name, source, slice(None))

    def _convert(self, name: str, source: Source, of: slice) -> Shaped[Tensor, "..."]:
        assert source.converter is not None
        converter = copy.deepcopy(source.converter)
        for pattern, names in source.names.items():
            converter.collected_tensors[pattern] = [self._read(one) for one in names[of]]
        first = name.replace(_target_of(source.converter, name), source.converter.target_patterns[0])
        made = converter.convert(first, model=self._model, config=self._model.config)[name]
        return made[0] if isinstance(made, list) else made

    def _read(self, name: str) -> Shaped[Tensor, "..."]:
        # the file is opened anew, so that its pages are given back with the tensor
        with safe_open(self._file[name], framework="pt") as file:
            tensor: Shaped[Tensor, "*S"] = file.get_tensor(name)
        if name not in self.scales:
            if tensor.dtype == torch.float8_e4m3fn:
                raise UnsupportedModel(f"model.base: {name} is in float8, and there are no scales ({name + SCALES})")
            return tensor
        with safe_open(self.scales[name], framework="pt") as file:
            return dequantise_blocks(tensor, file.get_tensor(name + SCALES), FLOAT8_BLOCK)

    def _is_whole(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the files hold all that a tensor is made of: what is stored expert by expert, for every expert."""
        if name not in self._sources:
            return False
        counts = {len(names) for names in self._sources[name].names.values()}
        return counts == {1} or counts == {shape[0]}

    def _report(self) -> dict[str, Any]:
        """What does not fit, as transformers reports it when it loads."""
        used = {name for source in self._sources.values() for names in source.names.values() for name in names}
        spared = getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or []
        plain = {name: self._sizes[one.first] for name, one in self._sources.items() if one.converter is None}
        return {
            "missing_keys": [name for name, shape in self.shapes.items() if not self._is_whole(name, shape)],
            "unexpected_keys": [
                name for name in self._file.keys() - used if not any(re.search(part, name) for part in spared)
            ],
            "mismatched_keys": [
                (name, size, self.shapes[name]) for name, size in plain.items() if size != self.shapes.get(name, size)
            ],
        }

    def _find_sources(self, state: dict[str, Tensor]) -> dict[str, Source]:
        conversions = get_model_conversion_mapping(self._model)
        renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
        converters = [one for one in conversions if isinstance(one, WeightConverter)]
        by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        found: dict[str, Source] = {}
        for key in sorted(self._file, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, self._model.base_model_prefix, state)
            if name not in state and key in state:
                name, pattern = key, None
            if name in state:
                source = found.setdefault(name, Source(by_pattern.get(pattern or ""), {}))
                source.names.setdefault(pattern or key, []).append(key)
        for name, source in list(found.items()):
            first, *others = source.converter.target_patterns if source.converter else [""]
            found |= {name.replace(first, other): source for other in others}
        return found


def _target_of(converter: WeightConverter, name: str) -> str:
    """The pattern of a converter's that this name comes from."""
    return next(target for target in converter.target_patterns if target in name)


def _dtype_of(model: Any, name: str, tensor: Shaped[Tensor, "..."]) -> torch.dtype:
    """As transformers loads it: some families keep some tensors in float32."""
    plan = model._get_dtype_plan(model.dtype)
    return next((dtype for part, dtype in plan.items() if part in name), tensor.dtype)
