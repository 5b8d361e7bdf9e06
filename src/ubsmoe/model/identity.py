"""Which base it is: one hash over its weights, whatever files they are stored in."""

import hashlib
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from ubsmoe import progress


def weights_sha256(model: torch.nn.Module) -> str:
    """One hash over all weights, by name: says which base an adapter belongs to, and that a run left it untouched."""
    digest = hashlib.sha256()
    for name, tensor in progress.through(sorted(model.state_dict().items()), "hashes the base's weights"):
        digest.update(name.encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()


def as_bytes(tensor: Shaped[Tensor, "..."]) -> memoryview:
    """A tensor's bytes, without a copy where it lies on the CPU in one piece."""
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
