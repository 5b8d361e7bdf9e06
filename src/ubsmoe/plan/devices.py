"""Devices by their memory, and the file that lists a user's own."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveFloat

from ubsmoe.config import ConfigError, Settings, read_toml, validated

GIB = 1 << 30
DEVICES = (4, 8, 12, 16, 24, 40, 80)
"""Memories of devices in GiB, from phones to accelerators, for the column that says which holds a tier."""

RUNTIME_BYTES = 420 << 20
"""What python, torch and transformers hold beside a base once they have trained a step, measured on Linux (`bench/plan.py`)."""


def smallest_device(memory_bytes: int) -> int | None:
    """GiB of the smallest of `DEVICES` that holds so much beside the libraries; None if none does."""
    return next((gib for gib in DEVICES if memory_bytes + RUNTIME_BYTES <= gib * GIB), None)


def fitting(tiers: Sequence[dict[str, Any]], memory: str) -> dict[str, Any]:
    """Which tiers a device of this memory, such as "16GiB" or "8GB", can train: beside the whole base, or where that is mapped.

    Python and its libraries are included.

    Raises:
        ConfigError: if that is no size.
    """
    size = size_in_bytes(memory, "--memory")
    held, mapped = (
        [tier["tier"] for tier in tiers if tier[needed] + RUNTIME_BYTES <= size]
        for needed in ("peak_memory_bytes", "mapped_memory_bytes")
    )
    return {"memory_bytes": size, "tiers": held, "mapped_tiers": mapped}


def size_in_bytes(text: str, where: str) -> int:
    """The bytes in "16GiB" or "8 GB". Raises ConfigError, which names `where` it stands, for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *(GiB|GB)", text.strip())
    if not match:
        raise ConfigError(f"{where} {text!r}: expected a size in GiB or GB, as in 16GiB")
    return round(float(match[1]) * (GIB if match[2] == "GiB" else 10**9))


class Machine(Settings):
    """One [[machines]] table of an inventory."""

    name: str = Field(description="what you call it")
    memory: str = Field(description="of the device that trains, as in 16GiB or 8GB")
    flops_per_second: PositiveFloat | None = Field(None, description="for the seconds of a round; none when left out")
    device: str = Field("cpu", description="torch device; a base can be mapped from disk on the CPU alone")

    @property
    def memory_bytes(self) -> int:
        """`memory` as a number."""
        return size_in_bytes(self.memory, f"machines.{self.name}.memory:")


class Inventory(Settings):
    """An inventory file: the machines that may take part."""

    machines: list[Machine] = Field(min_length=1, description="one table each")


def read_inventory(path: Path) -> list[Machine]:
    """The machines of an inventory file.

    Raises:
        ConfigError: if it cannot be read, or says something else than it should; with one sentence per fault.
    """
    machines = validated(Inventory, read_toml(path)).machines
    names = [machine.name for machine in machines]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"{path}: two machines are called {twice!r}; give each a name of its own")
    for machine in machines:
        size_in_bytes(machine.memory, f"machines.{machine.name}.memory:")
    return machines
