"""Ask the C library to keep freed memory for the next step instead of giving it back to the system."""

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # mallopt's names for them, <malloc.h>


def keep_freed_memory() -> bool:
    """Stop glibc from mapping every large tensor anew; a training step makes and frees the same ones over and over.

    Each fresh mapping costs a page fault per 4 KiB, which on small models takes longer than the arithmetic
    (bench/allocator.py measures it). Results do not change. The process keeps its peak memory until it ends.

    Returns:
        Whether there was a glibc to ask.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL("libc.so.6")
    limits = {_MMAP_THRESHOLD: 2**30, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 2**26}
    return all(libc.mallopt(name, value) == 1 for name, value in limits.items())
