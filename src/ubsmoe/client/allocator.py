"""Ask the C library to keep freed memory for the next step, and to give it back where that is too much."""

import ctypes
import platform
from functools import cache

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # mallopt's names for them, <malloc.h>
_MALLINFO = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
FREED_BYTES = 2**29
"""How much freed memory a process keeps from one task to the next."""
WIDE_EXPERT = 2**20
"""Weights in an expert's matrix from which on a client saves memory rather than time."""


def keep_freed_memory(expert_weights: int = 0) -> bool:
    """Stop glibc from mapping every large tensor anew; a training step makes and frees the same ones over and over.

    Each fresh mapping costs a page fault per 4 KiB, which on small models takes longer than the arithmetic
    (bench/allocator.py measures it). Results do not change. The process keeps its peak memory until it ends.

    On wide experts memory counts for more: what one phase of a step frees seldom fits the next one's tensors, and on OLMoE-1B-7B's
    shape the holes between them took up to as much as the tensors. There every tensor of 256 KiB or more is mapped anew, which
    takes a quarter off a step's own memory and adds 9 to 21 % to its time (docs/log.md).

    Args:
        expert_weights: h x f of the model that trains.

    Returns:
        Whether there was a glibc to ask.
    """
    if (libc := _glibc()) is None:
        return False
    mapped_from = 2**18 if expert_weights >= WIDE_EXPERT else 2**30
    limits = {_MMAP_THRESHOLD: mapped_from, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 2**26}
    return all(libc.mallopt(name, value) == 1 for name, value in limits.items())


def give_back_freed_memory(beyond: int = FREED_BYTES) -> bool:
    """Give the pages of freed memory back to the system where they are more than `beyond` bytes.

    What a server adds up would come on top of a step's holes. Small models stay below `beyond`, and pay no page faults.

    Returns:
        Whether it did.
    """
    if (libc := _glibc()) is None or not hasattr(libc, "mallinfo2"):
        return False
    return libc.mallinfo2().fordblks > beyond and libc.malloc_trim(0) == 1


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _MALLINFO]


@cache
def _glibc() -> ctypes.CDLL | None:
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL("libc.so.6")
    if hasattr(libc, "mallinfo2"):  # glibc 2.33
        libc.mallinfo2.restype = _Mallinfo
    return libc
