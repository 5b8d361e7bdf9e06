"""Tensors as safetensors files whose bytes, and therefore SHA-256, depend on nothing but the tensors."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ubsmoe.storage.json_text import encode_json

if TYPE_CHECKING:
    from torch import Tensor


METADATA = "__metadata__"
_CODES = {
    "uint64": "U64", "int64": "I64", "float64": "F64", "complex64": "C64", "float32": "F32", "uint32": "U32", "int32": "I32",
    "bfloat16": "BF16", "float16": "F16", "uint16": "U16", "int16": "I16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""What safetensors calls torch's dtypes, in the order in which its own writer puts them."""


def tensor_parts(
    tensors: Mapping[str, "Tensor"], facts: Mapping[str, Any] | None = None, **said: str
) -> list[bytes | memoryview]:
    """A safetensors file in pieces: its header, then each tensor's own memory; what lies whole on the CPU is not copied.

    Args:
        tensors: by name, in any order; any dtype safetensors knows, any device. Leave them as they are while parts are in use.
        facts: put into the header as one JSON text named "ubsmoe": safetensors writes several entries in random order.
        said: other entries of the header.

    Raises:
        ValueError: for the one name that safetensors keeps for itself.

    Source: the safetensors format; widest dtypes first and then by name, as its own writer puts them.
    """
    # here, because reading a run folder needs no torch unless its tensors are read
    from torch import uint8

    if METADATA in tensors:
        raise ValueError(f"a tensor cannot be called {METADATA}: safetensors keeps that name for its header")
    if facts is not None:
        said["ubsmoe"] = encode_json(dict(facts)).decode()
    header: dict[str, Any] = {METADATA: said} if said else {}
    parts: list[bytes | memoryview] = []
    codes, order, end = {name: _code(tensor) for name, tensor in tensors.items()}, list(_CODES.values()), 0
    for name in sorted(tensors, key=lambda name: (order.index(codes[name]), name)):
        tensor, start, end = tensors[name], end, end + tensors[name].nbytes
        header[name] = {"dtype": codes[name], "shape": [*tensor.shape], "data_offsets": [start, end]}
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        parts.append(flat.view(uint8).numpy().data if tensor.nbytes else b"")
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *parts]


def _code(tensor: "Tensor") -> str:
    return _CODES[str(tensor.dtype).removeprefix("torch.")]


def tensor_bytes(tensors: Mapping[str, "Tensor"], facts: Mapping[str, Any] | None = None) -> bytes:
    """A safetensors file, the same bytes whenever the tensors are the same. Arguments and errors as of `tensor_parts`.

    >>> import torch
    >>> read_facts(tensor_bytes({"a": torch.zeros(2)}, {"rank": 4}))
    {'rank': 4}
    """
    return b"".join(tensor_parts(tensors, facts))


def read_tensors(data: bytes) -> dict[str, "Tensor"]:
    """The tensors of a safetensors file, in the order of their names: safetensors gives them in a random one.

    Raises:
        ValueError: if these are not the bytes of such a file.
    """
    import safetensors.torch

    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"not a safetensors file: {error}") from error
    return dict(sorted(tensors.items()))


def read_facts(data: bytes) -> dict[str, Any]:
    """The facts in the header of a file that `tensor_bytes` made; none if it was made otherwise."""
    return dict(json.loads(read_said(data).get("ubsmoe", "{}")))


def read_said(data: bytes) -> dict[str, str]:
    """The entries of a safetensors file's header beside its tensors.

    The header is JSON: its length in the first eight bytes, then itself.
    """
    length = int.from_bytes(data[:8], "little")
    return dict(json.loads(data[8 : 8 + length]).get(METADATA, {}))
