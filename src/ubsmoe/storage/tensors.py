"""Tensors as safetensors files whose bytes, and therefore SHA-256, depend on nothing but the tensors."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ubsmoe.storage import disk

if TYPE_CHECKING:
    from torch import Tensor


def tensor_bytes(tensors: Mapping[str, "Tensor"], facts: Mapping[str, Any] | None = None) -> bytes:
    """A safetensors file, the same bytes whenever the tensors are the same.

    Args:
        tensors: by name, in any order; any dtype safetensors knows, any device.
        facts: put into the header as one JSON text named "ubsmoe": safetensors writes several entries in random order.

    Raises:
        ValueError: for the one name that safetensors keeps for itself.

    >>> import torch
    >>> read_facts(tensor_bytes({"a": torch.zeros(2)}, {"rank": 4}))
    {'rank': 4}
    """
    # here, because reading a run folder needs no torch unless its tensors are read
    import safetensors.torch
    import torch

    if "__metadata__" in tensors:
        raise ValueError("a tensor cannot be called __metadata__: safetensors keeps that name for its header")
    # Copies, because safetensors refuses tensors that share memory, as views of one fused tensor do.
    packed = {
        name: tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format) for name in sorted(tensors)
    }
    metadata = None if facts is None else {"ubsmoe": disk.encode_json(dict(facts)).decode()}
    return safetensors.torch.save(packed, metadata)


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
    """The facts in the header of a file that `tensor_bytes` made; none if it was made otherwise.

    The header is JSON: its length in the first eight bytes, then itself.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return dict(json.loads(header.get("__metadata__", {}).get("ubsmoe", "{}")))
