"""A byte-counted pool: the one bound on how much payload is in memory, whatever the number or size of files."""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import msgspec

from mover.errors import ConfigError

__all__ = ["BufferPool", "PoolStatistics"]


class PoolStatistics(msgspec.Struct, frozen=True):
    """A pool's state: bytes that may be held, are held, were held at most, and reservations that wait."""

    limit_bytes: int
    used_bytes: int
    peak_bytes: int
    waiting: int


class BufferPool:
    """Hands out memory by bytes, first come first served; a large request is not overtaken by small ones.

    Leased buffers are page-aligned (fit for direct I/O) and used again; what is kept for reuse counts as held.
    Belongs to one event loop.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._peak_bytes = 0
        self._waiting: deque[tuple[int, anyio.Event]] = deque()
        self._idle: list[mmap.mmap] = []
        self._idle_bytes = 0

    @property
    def limit_bytes(self) -> int:
        """What the pool may hold."""
        return self._limit_bytes

    def statistics(self) -> PoolStatistics:
        """The pool's state now."""
        return PoolStatistics(self._limit_bytes, self._used_bytes, self._peak_bytes, len(self._waiting))

    @asynccontextmanager
    async def reserve(self, size_bytes: int) -> AsyncIterator[None]:
        """Counts ``size_bytes`` as held inside the block; waits until they fit.

        Raises:
            ConfigError: the pool is smaller than the request, which could wait for ever.
        """
        await self._acquire(size_bytes)
        try:
            yield
        finally:
            self._release(size_bytes)

    @asynccontextmanager
    async def lease(self, size_bytes: int) -> AsyncIterator[memoryview]:
        """A writable, page-aligned buffer of ``size_bytes`` inside the block. Raises ConfigError as ``reserve``."""
        area_bytes = max(size_bytes, 1)  # no map is empty
        async with self.reserve(area_bytes):
            area = self._take_idle(area_bytes) or mmap.mmap(-1, area_bytes)
            view = memoryview(area)
            try:
                yield view[:size_bytes]
            finally:
                view.release()
                self._keep_idle(area)

    async def _acquire(self, size_bytes: int) -> None:
        if size_bytes > self._limit_bytes:
            raise ConfigError("MOVER_BUFFER_MB", self._limit_bytes >> 20, f"at least {-(-size_bytes // (1 << 20))}")
        if self._waiting or self._used_bytes + size_bytes > self._limit_bytes:
            admitted = anyio.Event()
            entry = (size_bytes, admitted)
            self._waiting.append(entry)
            try:
                await admitted.wait()
            except BaseException:
                if admitted.is_set():
                    self._release(size_bytes)
                else:
                    self._waiting.remove(entry)
                    self._admit_waiting()
                raise
        else:
            self._hold(size_bytes)

    def _hold(self, size_bytes: int) -> None:
        self._used_bytes += size_bytes
        self._drop_idle(self._limit_bytes - self._used_bytes)
        self._peak_bytes = max(self._peak_bytes, self._used_bytes)

    def _release(self, size_bytes: int) -> None:
        self._used_bytes -= size_bytes
        self._admit_waiting()

    def _admit_waiting(self) -> None:
        while self._waiting and self._used_bytes + self._waiting[0][0] <= self._limit_bytes:
            size_bytes, admitted = self._waiting.popleft()
            self._hold(size_bytes)
            admitted.set()

    def _take_idle(self, size_bytes: int) -> mmap.mmap | None:
        for index, area in enumerate(self._idle):
            if len(area) == size_bytes:
                self._idle_bytes -= size_bytes
                return self._idle.pop(index)
        return None

    def _keep_idle(self, area: mmap.mmap) -> None:
        # the lease's own bytes are still counted as used here, and released right after
        if self._idle_bytes + self._used_bytes <= self._limit_bytes:
            self._idle.append(area)
            self._idle_bytes += len(area)

    def _drop_idle(self, keep_bytes: int) -> None:
        while self._idle and self._idle_bytes > keep_bytes:
            self._idle_bytes -= len(self._idle.pop(0))
