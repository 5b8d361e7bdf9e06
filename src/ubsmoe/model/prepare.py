"""Store a base so that runs map it: experts fused, maybe quantised, written piece by piece, and named by its SHA-256.

What is mapped costs no memory of its own: the system reads pages as they are used, drops them when it needs room, and all
processes share them. A checkpoint that keeps its experts one by one has to be converted first, and so has one of another dtype.
"""

import copy
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from jaxtyping import Shaped
from safetensors import safe_open
from torch import Tensor

from ubsmoe import progress
from ubsmoe.costs.workload import ExpertFormat
from ubsmoe.model.checkpoint import check_finite
from ubsmoe.model.conventions import UnsupportedModel, find_blocks
from ubsmoe.model.expert_weights import matrix_names
from ubsmoe.model.fused import Checkpoint
from ubsmoe.model.identity import as_bytes
from ubsmoe.model.presets import QUANT_METHOD
from ubsmoe.model.quantised import PACKED_DTYPE, packed_names, packed_sizes, put_in_place, quantised
from ubsmoe.storage import bases

_DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int8: "I8", torch.int64: "I64",
}  # fmt: skip


def cache() -> Path:
    """Where prepared bases and known hashes lie: beside the hub's cache."""
    return Path(HF_HOME) / "ubsmoe"


def expert_matrices(model: Any) -> dict[str, tuple[Any, str]]:
    """Name in the state dict -> (experts module, name in it), of every expert matrix of a model."""
    paths = {module: path for path, module in model.named_modules()}
    return {
        f"{paths[experts]}.{stored}": (experts, stored)
        for _, experts in find_blocks(model)
        for stored in matrix_names(experts)
    }


class Preparation:
    """A base on its way into a folder.

    Args:
        skeleton: the model without weights, in the dtype that runs use.
        files: its safetensors files.
        format: what experts are quantised to.
    """

    def __init__(self, skeleton: Any, files: list[Path], format: ExpertFormat | None) -> None:
        self.checkpoint, self.format, self.skeleton = Checkpoint(skeleton, files), format, skeleton
        self._quantised = expert_matrices(skeleton) if format else {}

    @property
    def stored(self) -> dict[str, bases.Stored]:
        """Every tensor of the new file."""
        found = {}
        for name, shape in self.checkpoint.shapes.items():
            if name in self._quantised and self.format:
                sizes = packed_sizes((shape[1], shape[2]), self.format)
                kinds = PACKED_DTYPE[self.format], torch.float32
                for part, size, dtype in zip(packed_names(name, self.format), sizes, kinds, strict=True):
                    found[part] = bases.Stored(_DTYPES[dtype], (shape[0], size))
            else:
                found[name] = bases.Stored(_DTYPES[self.checkpoint.dtype(name)], shape)
        return found

    @property
    def size(self) -> int:
        """Bytes of the new file."""
        return sum(one.num_bytes for one in self.stored.values())

    def write(self, folder: Path, tokenizer: Any = None) -> dict[str, Any]:
        """Write config, weights and tokenizer into a folder; gives the facts about it."""
        config = copy.deepcopy(self.skeleton.config)
        config.dtype = self.skeleton.dtype
        if self.format:
            config.quantization_config = {"quant_method": QUANT_METHOD, "experts": self.format}
        config.save_pretrained(folder)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, folder)
        file = bases.WeightsFile(folder / bases.WEIGHTS, self.stored)
        digest = hashlib.sha256()
        try:
            for name in progress.through(sorted({*self.checkpoint.shapes, *self.checkpoint.tied}), "prepares the base"):
                digest.update(name.encode())
                for piece in self.checkpoint.pieces(self.checkpoint.tied.get(name, name)):
                    check_finite([(name, piece)], config.name_or_path)
                    digest.update(as_bytes(piece))
                    if name in self.checkpoint.shapes:
                        self._append(file, name, piece)
        finally:
            stored = file.close()
        dtype = str(self.skeleton.dtype).removeprefix("torch.")
        return {"sha256": digest.hexdigest(), "stored_sha256": stored, "dtype": dtype, "experts": self.format}

    def _append(self, file: bases.WeightsFile, name: str, piece: Shaped[Tensor, "..."]) -> None:
        if self.format is None or name not in self._quantised:
            return file.append(name, as_bytes(piece))
        for matrix in piece.view(-1, *self.checkpoint.shapes[name][1:]):
            for part, tensor in zip(packed_names(name, self.format), quantised(matrix, self.format), strict=True):
                file.append(part, as_bytes(tensor))


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # a bare one is all that tokenizers says of a disk that refuses
        raise OSError(f"{error}, of the tokenizer") from error


def prepared(preparation: Preparation, files: list[Path], dtype: str, tokenizer: Any = None) -> Path:
    """The folder in the cache that holds this base, which is written if it is not there yet.

    Raises:
        BaseFolderError: if it has to be written and cannot be.
    """
    plain = bases.fingerprint(files, dtype)
    sha256 = bases.known_sha256(cache(), plain)
    if sha256 and _is_right(folder := _folder(sha256, dtype, preparation.format), sha256, preparation):
        return folder
    draft = cache() / "bases" / bases.fingerprint(files, dtype, str(preparation.format))[:16]
    with bases.alone(cache()):
        sha256 = bases.known_sha256(cache(), plain)
        if sha256 and _is_right(folder := _folder(sha256, dtype, preparation.format), sha256, preparation):
            return folder  # another process was first
        logging.getLogger("ubsmoe").warning(
            "preparing the base once, so that runs can map it: %.1f GB into %s",
            preparation.size / 1e9,
            cache() / "bases",
        )
        return _write(preparation, draft, dtype, plain, tokenizer)


def _write(preparation: Preparation, draft: Path, dtype: str, plain: str, tokenizer: Any) -> Path:
    facts: dict[str, Any] = {}

    def fill(folder: Path) -> dict[str, Any]:
        facts.update(preparation.write(folder, tokenizer))
        return facts

    bases.write_base(draft, preparation.size, fill, lambda: _folder(facts["sha256"], dtype, preparation.format))
    bases.remember_sha256(cache(), plain, facts["sha256"])
    folder = _folder(facts["sha256"], dtype, preparation.format)
    bases.remember_sha256(cache(), bases.fingerprint([folder / bases.WEIGHTS]), facts["stored_sha256"])
    return folder


def _folder(sha256: str, dtype: str, format: ExpertFormat | None) -> Path:
    return cache() / "bases" / "-".join([sha256[:16], dtype, *([format] if format else [])])


def _is_right(folder: Path, sha256: str, preparation: Preparation) -> bool:
    """Whether a folder is whole, and holds these weights under the names that the model now has."""
    facts = bases.read_facts(folder)
    if facts is None or facts.get("sha256") != sha256:
        return False
    with safe_open(folder / bases.WEIGHTS, framework="pt") as file:
        return set(file.keys()) == preparation.stored.keys()


def check_stored(folder: Path) -> dict[str, Any]:
    """The facts of a prepared base whose bytes are those that were written; read in full only when its files have changed.

    Raises:
        UnsupportedModel: if it is not whole, or its bytes are others.
    """
    facts = bases.read_facts(folder)
    if facts is None:
        raise UnsupportedModel(
            f"model.base: {folder} is half a prepared base; copy the whole folder, or prepare it again"
        )
    key = bases.fingerprint([folder / bases.WEIGHTS])
    found = bases.known_sha256(cache(), key) or bases.stored_sha256(folder)
    if found != facts["stored_sha256"]:
        raise UnsupportedModel(
            f"model.base: {folder} is damaged: its weights are not those that were prepared; prepare it again"
        )
    bases.remember_sha256(cache(), key, found)
    return facts


def mapped(folder: Path, skeleton: Any, format: ExpertFormat) -> Any:
    """The model of a folder with quantised experts, on the CPU, every weight mapped.

    transformers gets everything but the experts' matrices, and for them numbers that take no memory.
    """
    tensors = dict(_tensors(folder))
    places = expert_matrices(skeleton)
    packed = {name: [tensors.pop(part) for part in packed_names(name, format)] for name in places}
    empty = {
        name: torch.empty(1, dtype=skeleton.dtype).expand(getattr(experts, stored).shape)
        for name, (experts, stored) in places.items()
    }
    model = type(skeleton).from_pretrained(
        None, config=skeleton.config, dtype=skeleton.dtype, state_dict=tensors | empty
    )
    for name, (experts, stored) in expert_matrices(model).items():
        put_in_place(experts, stored, format, *packed[name])
    return model


def _tensors(folder: Path) -> Iterator[tuple[str, Shaped[Tensor, "..."]]]:
    with safe_open(folder / bases.WEIGHTS, framework="pt") as file:
        for name in list(file.keys()):
            yield name, file.get_tensor(name)
