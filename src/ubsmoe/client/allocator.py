"""Ask the C library to keep freed memory for the next step, and to give it back where that is too much."""

import ctypes
import platform
from functools import cache

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # mallopt's names for them, <malloc.h>
_MALLINFO = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
FREED_BYTES = 2**29
"""How much freed memory a process keeps from one task to the next."""


def keep_freed_memory() -> bool:
    """Stop glibc from mapping every large tensor anew; a training step makes and frees the same ones over and over.

    Each fresh mapping costs a page fault per 4 KiB, which on small models takes longer than the arithmetic
    (bench/allocator.py measures it). Results do not change. The process keeps its peak memory until it ends.

    Returns:
        Whether there was a glibc to ask.
    """
    if (libc := _glibc()) is None:
        return False
    limits = {_MMAP_THRESHOLD: 2**30, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 2**26}
    return all(libc.mallopt(name, value) == 1 for name, value in limits.items())


def give_back_freed_memory(beyond: int = FREED_BYTES) -> bool:
    """Give the pages of freed memory back to the system where they are more than `beyond` bytes.

    What one phase of a step frees seldom fits the next one's tensors: OLMoE-1B-7B's shape holds half as much again as its tensors
    take after eight steps, and what a server adds up would come on top. Small models stay below `beyond`, and pay no page faults.

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
