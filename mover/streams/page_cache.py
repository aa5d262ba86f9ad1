"""What this host keeps of a file in memory: dropped, counted, and gone around. Everything here blocks."""

from __future__ import annotations

import ctypes
import mmap
import os

from mover.streams.durable import sync_file

__all__ = ["ALIGNMENT_BYTES", "aligned_buffer", "drop_pages", "resident_bytes"]

ALIGNMENT_BYTES = 4096
"""What O_DIRECT asks of offsets, lengths and memory on every file system in use."""

_MAPPED_BYTES = 1 << 30  # mapped at a time: a private map of terabytes is refused as overcommitment
_libc = ctypes.CDLL(None, use_errno=True)


def aligned_buffer(size_bytes: int) -> mmap.mmap:
    """Anonymous memory that begins at a page, as O_DIRECT needs it."""
    return mmap.mmap(-1, size_bytes)


def drop_pages(fd: int) -> None:
    """Asks the kernel to forget the whole file; unwritten pages are written first, as they would stay.

    Raises:
        OSError: they cannot be written.
    """
    sync_file(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def resident_bytes(fd: int, *, enough_bytes: int | None = None) -> int:
    """Bytes of the file that are in the page cache, counted in pages; stops counting at ``enough_bytes``.

    The kernel calls everything resident to those who may neither write nor own the file: the safe answer here.

    Raises:
        OSError: the file cannot be mapped.
    """
    size_bytes = os.fstat(fd).st_size
    found_bytes = 0
    for start in range(0, size_bytes, _MAPPED_BYTES):
        found_bytes += _resident_pages(fd, start, min(_MAPPED_BYTES, size_bytes - start)) * mmap.PAGESIZE
        if enough_bytes is not None and found_bytes >= enough_bytes:
            break
    return found_bytes


def _resident_pages(fd: int, start: int, length: int) -> int:
    # A copy-on-write map, never written to: ctypes gives addresses of writable memory only.
    with mmap.mmap(fd, length, access=mmap.ACCESS_COPY, offset=start) as mapped:
        flags = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapped)
        try:
            failed = _libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(length), flags)
        finally:
            del first  # the map cannot be closed while something points into it
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return bytes(flags).translate(_LOWEST_BIT).count(1)


_LOWEST_BIT = bytes(value & 1 for value in range(256))
