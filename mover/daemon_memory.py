"""How the C library's allocator keeps memory: a process of weeks with many threads otherwise grows by fragmentation.

By default each thread gets an arena of its own, and what long-lived blocks pin there is not used for others; large
blocks come from arenas, too, once some of them have been freed.
"""

from __future__ import annotations

import ctypes
from typing import Final

__all__ = ["ARENAS", "bound_arenas"]

ARENAS: Final = 2
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # glibc's malloc.h
_MMAP_BYTES: Final = 1 << 20
"""Larger blocks go back to the system when they are freed."""


def bound_arenas() -> bool:
    """Sets both for this process, before it has threads; False where the C library has no such thing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_M_ARENA_MAX, ARENAS)) and bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES))
