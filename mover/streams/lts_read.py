"""Reads a datablock from the LTS: waits until it is back from tape, keeps the page cache out, never reads for ever."""

from __future__ import annotations

import errno
import math
import mmap
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

import anyio
import msgspec

from mover.errors import LayoutMismatchError, LtsError, MoverError, RecallTimeoutError
from mover.policies.recall import RecallPolicy, Residency, residency
from mover.streams.abandon import run_abandonable
from mover.streams.lts_mount import MEMORY_FILESYSTEMS, filesystem_of, translate_lts
from mover.streams.page_cache import ALIGNMENT_BYTES, aligned_buffer, drop_pages, resident_bytes

__all__ = ["LtsReader", "open_when_online"]

_PIECE_BYTES = 4 << 20
_LATER = frozenset({errno.EAGAIN, errno.EBUSY})  # a tape system's "not now"
_PASSING = _LATER | {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENODATA}
_REPORT_EVERY_S = 10.0
"""How often a wait that blocks is reported."""

_BLOCKS = "the read of the first byte blocks"


class LtsReader:
    """An open datablock of known size; several threads may read at a time.

    Attributes:
        path: the file.
        size_bytes: its size.
        was_offline: it was on tape when it was opened, as far as the mount shows it.
        cache: how this host's page cache is kept out: ``direct``, ``dropped``, ``memory``, or '' when it is not.
    """

    def __init__(self, fd: int, path: Path, size_bytes: int, *, was_offline: bool, policy: RecallPolicy) -> None:
        """Takes over ``fd``; use ``open_when_online``."""
        self._fd = fd
        self._closed = False
        self._policy = policy
        self.path = path
        self.size_bytes = size_bytes
        self.was_offline = was_offline
        self.cache: Literal["", "direct", "dropped", "memory"] = ""
        self._buffers: list[mmap.mmap] = []

    def drop_cache(self) -> Literal["", "direct", "dropped", "memory"]:
        """Sees to it that what is read comes from the storage; returns what ``cache`` is from now on. Blocking.

        Pages that stay although they were dropped (somebody maps the file) are gone around with O_DIRECT. '' where
        neither works, ``memory`` on a file system whose storage is this host's memory. On a network mount the server's
        own memory is out of reach.

        Raises:
            LtsError: the mount fails.
        """
        with translate_lts("drop cache", self.path):
            drop_pages(self._fd)
            if filesystem_of(self.path) in MEMORY_FILESYSTEMS:
                self.cache = "memory"
            elif resident_bytes(self._fd, enough_bytes=1) == 0:
                self.cache = "dropped"
            else:
                self.cache = "direct" if self._reopen_direct() else ""
        return self.cache

    def read_into(self, offset_bytes: int, view: memoryview) -> None:
        """Fills ``view`` from ``offset_bytes``. Blocking, for as long as the mount does.

        Raises:
            LayoutMismatchError: the file ends before.
            LtsError: the mount fails.
        """
        self._require_within(offset_bytes, view.nbytes)
        if self.cache == "direct":
            for start in range(0, view.nbytes, _PIECE_BYTES):
                part = view[start : start + _PIECE_BYTES]
                buffer = self._borrow()
                part[:] = _read_piece(self._fd, offset_bytes + start, part.nbytes, buffer, self.path)
                self._buffers.append(buffer)
        else:
            with translate_lts("read", self.path):
                _fill(self._fd, offset_bytes, view, self.path)
        self._forget(self._fd, offset_bytes, view.nbytes)

    async def read(self, offset_bytes: int, view: memoryview, stall_timeout_s: float) -> None:
        """As ``read_into``, off the event loop, and given up when no byte comes for ``stall_timeout_s`` seconds.

        Answers of "not now" are repeated within that time. A read that is given up on never touches ``view`` again.

        Raises:
            LayoutMismatchError: the file ends before.
            LtsError: the mount fails or stalls.
        """
        self._require_within(offset_bytes, view.nbytes)
        for start in range(0, view.nbytes, _PIECE_BYTES):
            part = view[start : start + _PIECE_BYTES]
            try:
                with anyio.fail_after(stall_timeout_s):
                    await self._read_patiently(offset_bytes + start, part)
            except TimeoutError as error:
                raise LtsError("read", str(self.path), f"no byte for {stall_timeout_s:g} s") from error

    def close(self) -> None:
        """Lets go of the file; closing twice is fine. Blocking."""
        if not self._closed:
            self._closed = True
            os.close(self._fd)

    async def _read_patiently(self, offset_bytes: int, part: memoryview) -> None:
        attempt = 0
        while True:
            attempt += 1
            buffer = self._borrow()
            # The thread owns its descriptor: an abandoned one must not read whatever file gets the number next.
            fd = os.dup(self._fd)
            job = partial(self._read_piece_and_close, fd, offset_bytes, part.nbytes, buffer)
            try:
                part[:] = await run_abandonable(job, math.inf)
            except LtsError as error:
                cause = error.__cause__
                if not isinstance(cause, OSError) or cause.errno not in _LATER:
                    raise
            else:
                self._buffers.append(buffer)  # one that was abandoned with its thread is never used again
                return
            await anyio.sleep(self._policy.wait_s(attempt, 0.0) or self._policy.longest_wait_s)

    def _borrow(self) -> mmap.mmap:
        try:
            return self._buffers.pop()
        except IndexError:
            return aligned_buffer(_PIECE_BYTES + 2 * ALIGNMENT_BYTES)

    def _require_within(self, offset_bytes: int, size_bytes: int) -> None:
        if offset_bytes < 0 or offset_bytes + size_bytes > self.size_bytes:
            raise LayoutMismatchError(str(self.path), "size in bytes", offset_bytes + size_bytes, self.size_bytes)

    def _read_piece_and_close(self, fd: int, offset_bytes: int, size_bytes: int, buffer: mmap.mmap) -> memoryview:
        try:
            piece = _read_piece(fd, offset_bytes, size_bytes, buffer, self.path)
            self._forget(fd, offset_bytes, size_bytes)
        finally:
            os.close(fd)
        return piece

    def _forget(self, fd: int, offset_bytes: int, size_bytes: int) -> None:
        """Leaves this host's memory to others: what was read for a check is not read again."""
        if self.cache == "dropped":
            with suppress(OSError):
                os.posix_fadvise(fd, offset_bytes, size_bytes, os.POSIX_FADV_DONTNEED)

    def _reopen_direct(self) -> bool:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            same = os.path.samestat(os.fstat(fd), os.fstat(self._fd))
            usable = same and os.preadv(fd, [aligned_buffer(ALIGNMENT_BYTES)], 0) == min(
                ALIGNMENT_BYTES, self.size_bytes
            )
        except OSError:
            usable = False
        if usable:
            os.dup2(fd, self._fd, inheritable=False)
        os.close(fd)
        return usable


class _Look(msgspec.Struct):
    """What one attempt to read the first byte found; ``fd`` is open when the file is there to be read."""

    state: Residency
    size_bytes: int = 0
    fd: int | None = None
    was_offline: bool = False
    reason: str = ""


async def open_when_online(
    path: Path,
    expected_bytes: int,
    *,
    policy: RecallPolicy,
    clock: Callable[[], float] = anyio.current_time,
    sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    on_wait: Callable[[str, float], None] = lambda _reason, _waited_s: None,
) -> LtsReader:
    """Opens a datablock once its first byte can be read, which makes a tape system fetch it.

    A file may block, be refused for a while, or look empty or short; ``on_wait`` is told which, with the seconds waited
    so far. A sparse file and a stub look alike, so only the read decides.

    Raises:
        RecallTimeoutError: no byte within ``policy.timeout_s``.
        LayoutMismatchError: the file is longer than ``expected_bytes``, or stays shorter though it is not empty.
        LtsError: there is no such file, or the mount fails for good.
    """
    began = clock()
    attempt, was_offline = 0, False
    while True:
        attempt += 1
        # the last look comes at the deadline and gets a moment, too
        left_s = max(policy.timeout_s - (clock() - began), policy.first_wait_s)
        try:
            look = await _look_within(left_s, path, expected_bytes, lambda: on_wait(_BLOCKS, clock() - began))
        except TimeoutError as error:
            raise RecallTimeoutError(str(path), clock() - began, _BLOCKS) from error
        was_offline = was_offline or look.was_offline
        if look.fd is not None:
            return LtsReader(look.fd, path, expected_bytes, was_offline=was_offline, policy=policy)
        waited_s = clock() - began
        wait_s = policy.wait_s(attempt, waited_s)
        if wait_s is None:
            raise _never_online(path, expected_bytes, look, waited_s)
        on_wait(look.reason, waited_s)
        await sleep(wait_s)


async def _look_within(timeout_s: float, path: Path, expected_bytes: int, on_tick: Callable[[], None]) -> _Look:
    job = partial(_look, path, expected_bytes)
    return await run_abandonable(job, timeout_s, dispose=_close_look, on_tick=on_tick, tick_s=_REPORT_EVERY_S)


def _never_online(path: Path, expected_bytes: int, look: _Look, waited_s: float) -> MoverError:
    if look.state is Residency.EMPTY and look.size_bytes > 0:
        return LayoutMismatchError(str(path), "size in bytes", expected_bytes, look.size_bytes)
    return RecallTimeoutError(str(path), waited_s, look.reason)


def _close_look(look: _Look) -> None:
    if look.fd is not None:
        os.close(look.fd)


def _look(path: Path, expected_bytes: int) -> _Look:
    with translate_lts("recall", path):
        try:
            return _try_first_byte(path, expected_bytes)
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            return _Look(Residency.REFUSED, was_offline=error.errno in _LATER, reason=f"refused: {error.strerror}")


def _try_first_byte(path: Path, expected_bytes: int) -> _Look:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        before = os.fstat(fd)
        state = residency(before.st_size, before.st_blocks, expected_bytes)
        if state is not Residency.EMPTY:
            os.preadv(fd, [bytearray(1)], 0)
        after = os.fstat(fd)
    except BaseException:
        os.close(fd)
        raise
    if after.st_size == expected_bytes:
        recalled = state is Residency.OFFLINE and after.st_blocks > 0
        return _Look(Residency.ONLINE, after.st_size, fd, was_offline=recalled)
    os.close(fd)
    if after.st_size > expected_bytes:
        raise LayoutMismatchError(str(path), "size in bytes", expected_bytes, after.st_size)
    reason = f"{Residency.EMPTY}: {after.st_size:,} of {expected_bytes:,} bytes"
    return _Look(Residency.EMPTY, after.st_size, was_offline=True, reason=reason)


def _read_piece(fd: int, offset_bytes: int, size_bytes: int, buffer: mmap.mmap, path: Path) -> memoryview:
    """Reads whole aligned blocks around the piece, as O_DIRECT asks; returns the piece within ``buffer``."""
    lead_bytes = offset_bytes % ALIGNMENT_BYTES
    wanted_bytes = lead_bytes + size_bytes
    view = memoryview(buffer)[: -(-wanted_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES]
    with translate_lts("read", path):
        _fill(fd, offset_bytes - lead_bytes, view, path, wanted_bytes)
    return view[lead_bytes:wanted_bytes]


def _fill(fd: int, offset_bytes: int, view: memoryview, path: Path, enough_bytes: int | None = None) -> None:
    """Reads until ``enough_bytes`` of ``view`` (default: all) are there; short reads go on where they ended."""
    enough_bytes = view.nbytes if enough_bytes is None else enough_bytes
    done_bytes = 0
    while done_bytes < enough_bytes:
        count = os.preadv(fd, [view[done_bytes:]], offset_bytes + done_bytes)
        if count == 0:
            found_bytes = os.fstat(fd).st_size
            raise LayoutMismatchError(str(path), "size in bytes", offset_bytes + enough_bytes, found_bytes)
        done_bytes += count
