"""One random generator per (run seed, client, round, purpose): never the global one, and no order of calls matters."""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_for(*key: str | int) -> int:
    """A 63-bit seed from a key, the same on every machine and in every process.

    >>> seed_for(0, "client-3", 2, "batches") == seed_for(0, "client-3", 2, "batches")
    True
    >>> seed_for(0, "a") == seed_for(0, "b")
    False
    """
    digest = hashlib.sha256("\x1f".join(str(part) for part in key).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_for(*key: str | int) -> "torch.Generator":
    """A CPU generator seeded by `seed_for`."""
    import torch  # here, because drawing data needs seeds and no torch

    return torch.Generator().manual_seed(seed_for(*key))
