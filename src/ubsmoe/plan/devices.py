"""Which devices hold a tier."""

import re
from collections.abc import Sequence
from typing import Any

from ubsmoe.config import ConfigError

GIB = 1 << 30
DEVICES = (4, 8, 12, 16, 24, 40, 80)
"""Memories of devices in GiB, from phones to accelerators, for the column that says which holds a tier."""

RUNTIME_BYTES = 420 << 20
"""What python, torch and transformers hold beside a base once they have trained a step, measured on Linux (`bench/plan.py`)."""


def smallest_device(memory_bytes: int) -> int | None:
    """GiB of the smallest of `DEVICES` that holds so much beside the libraries; None if none does."""
    return next((gib for gib in DEVICES if memory_bytes + RUNTIME_BYTES <= gib * GIB), None)


def fitting(tiers: Sequence[dict[str, Any]], memory: str) -> dict[str, Any]:
    """Which tiers a device of this memory can train, such as "16GiB" or "8GB"; python and its libraries included.

    Raises:
        ConfigError: if that is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *(GiB|GB)", memory.strip())
    if not match:
        raise ConfigError(f"--memory {memory!r}: expected a size in GiB or GB, as in 16GiB")
    size = round(float(match[1]) * (GIB if match[2] == "GiB" else 10**9))
    held = [tier["tier"] for tier in tiers if tier["peak_memory_bytes"] + RUNTIME_BYTES <= size]
    return {"memory_bytes": size, "tiers": held}
