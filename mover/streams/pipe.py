"""The stream itself: object → hash → datablock. Units in flight side by side, each byte written once, at its offset."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from time import monotonic
from typing import Protocol

import anyio
import anyio.to_thread
import msgspec

from mover.errors import LtsError, MoverError, NotEnoughSpaceError
from mover.model import Datablock, Manifest, ManifestMember, Member, window_range
from mover.policies.retry import Progressing, RetryPolicy, retry_class, retrying
from mover.streams.hashing import WindowHash, digest_of
from mover.streams.interfaces import Buffer, ByteRange, ObjectReader, PositionalSink
from mover.streams.memory import BufferPool
from mover.streams.units import Batch, Slice, WindowKey, cut
from mover.tasks import open_task_group

__all__ = [
    "STREAM_BUFFER_BYTES",
    "Lanes",
    "Locate",
    "Move",
    "MoveCounters",
    "UnitMover",
    "UnitSink",
    "WindowDigest",
]

STREAM_BUFFER_BYTES = 1 << 20
"""What one window in flight takes of the pool."""

_UNITS_IN_FLIGHT = 16  # of one datablock: with batches of 64 members enough for any number of requests, still in order
_CHECKPOINT_BYTES = 256 << 20
_CHECKPOINT_S = 1.0
_LAST_CHECKPOINT_S = 20.0  # what a cancelled move may take to make its last windows durable

WindowDigest = tuple[int, int, str]
"""(index of the member, number of the window, xxh3_128 of its bytes as received)"""

Locate = Callable[[Member | ManifestMember, int, int], ByteRange]
"""Where bytes ``start`` to ``end`` of a member come from: its own object, or a datablock object that holds it."""


class UnitSink(Protocol):
    """Takes bytes in any order, each once, from several threads at a time: a file, or a part of an object in memory."""

    def write_at(self, offset_bytes: int, buffers: Sequence[Buffer], /) -> None:
        """Writes the buffers in a row from ``offset_bytes`` of the datablock. Blocking."""
        ...


class Lanes:
    """What the moves of one process share: memory, requests in flight, worker threads, the retry policy."""

    def __init__(
        self, reader: ObjectReader, pool: BufferPool, *, requests: int, streams: int, retry: RetryPolicy
    ) -> None:
        self.reader, self.pool, self.retry = reader, pool, retry
        self.requests = anyio.CapacityLimiter(requests)
        self.streams = anyio.CapacityLimiter(streams)
        self.disk = anyio.CapacityLimiter(streams + 2)
        self.retries: Counter[str] = Counter()
        self.workers = min(requests, _UNITS_IN_FLIGHT)

    async def retrying(self, attempt: Callable[[], Awaitable[None]], progress: Progressing | None = None) -> None:
        """Awaits ``attempt`` under the retry policy; repetitions are counted by their class.  Raises MoverError."""
        await retrying(attempt, self.retry, progress=progress, on_retry=self._count_retry)

    def _count_retry(self, error: MoverError, _attempt: int, _pause_s: float) -> None:
        self.retries[retry_class(error)] += 1

    def stream_slot(self) -> AbstractAsyncContextManager[None]:
        """A place among the streaming windows."""
        return _both(self.streams, self.requests)


@asynccontextmanager
async def _both(first: anyio.CapacityLimiter, second: anyio.CapacityLimiter) -> AsyncIterator[None]:
    async with first, second:
        yield


class MoveCounters(msgspec.Struct):
    """Bytes of one move: received from S3, taken over from an earlier run."""

    received_bytes: int = 0
    reused_bytes: int = 0


class Move:
    """Writes one datablock. ``digests`` holds every window's digest once ``run`` has returned."""

    def __init__(
        self,
        datablock: Datablock | Manifest,
        sink: PositionalSink,
        lanes: Lanes,
        locate: Locate,
        record: Callable[[Sequence[WindowDigest]], None],
        durable: dict[WindowKey, str],
    ) -> None:
        """Prepares a move.

        Args:
            datablock: the plan, or the manifest of a datablock that is rebuilt.
            sink: the file.
            lanes: shared resources.
            locate: where the bytes come from.
            record: makes digests of durable windows durable; blocking, called in a worker thread.
            durable: digests of the windows that are in the file already.
        """
        self.digests: dict[WindowKey, str] = dict(durable)
        self.counters = MoveCounters(reused_bytes=_window_bytes(datablock, durable))
        self._datablock, self._lanes, self._durable = datablock, lanes, durable.keys()
        self._mover = UnitMover(sink, lanes, lanes.pool, locate, self.counters)
        self._checkpoints = _Checkpoints(sink, record, lanes.disk)

    async def run(self) -> None:
        """Moves what is not durable yet; afterwards everything is.

        Cancelled or failed, it first makes what it has durable, so that the next run goes on from there.
        """
        units = cut(self._datablock, self._durable)
        try:
            async with open_task_group() as tasks:
                for _ in range(self._lanes.workers):
                    tasks.start_soon(self._work, units)
        except BaseException:
            # best effort: a failure here must not hide why the move ended
            with anyio.CancelScope(shield=True), anyio.move_on_after(_LAST_CHECKPOINT_S), suppress(MoverError):
                await self._checkpoints.flush()
            raise
        await self._checkpoints.flush()

    async def _work(self, units: Iterator[Batch | Slice]) -> None:
        for unit in units:  # shared: each worker takes the next one
            digests = await self._mover.move(unit)
            self.digests.update(((index, window), digest) for index, window, digest in digests)
            await self._checkpoints.add(digests, unit.payload_bytes)


class UnitMover:
    """Moves single units: fetches their bytes and writes them, with the tar structure, where they belong."""

    def __init__(self, sink: UnitSink, lanes: Lanes, pool: BufferPool, locate: Locate, counters: MoveCounters) -> None:
        """``pool`` bounds the memory of what is on its way to ``sink``; ``counters`` is kept up to date."""
        self._sink, self._lanes, self._pool, self._locate, self._counters = sink, lanes, pool, locate, counters

    async def move(self, unit: Batch | Slice) -> list[WindowDigest]:
        """Moves one unit, with as many attempts as the policy allows; returns the digests of its windows as received.

        Raises:
            MoverError: as of ``ObjectReader`` after the last attempt, and of the sink.
        """
        return [await self._move_slice(unit)] if isinstance(unit, Slice) else await self._move_batch(unit)

    async def _move_slice(self, unit: Slice) -> WindowDigest:
        # memory first, then a slot, as batches do: the other way round the two kinds could wait for each other
        async with self._pool.lease(STREAM_BUFFER_BYTES) as buffer, self._lanes.stream_slot():
            stream = _SliceStream(unit, self._sink)
            progress = Progressing()

            async def attempt() -> None:
                before = stream.position
                try:
                    item = self._locate(unit.member, stream.position, unit.end)
                    await self._lanes.reader.stream(item, buffer, stream.consume)
                except (LtsError, NotEnoughSpaceError) as exc:
                    stream.write_failure = exc  # fetching again would not mend it
                finally:
                    if stream.position > before:
                        progress.advanced()
                    self._counters.received_bytes += stream.position - before

            await self._lanes.retrying(attempt, progress)
            if stream.write_failure is not None:
                raise stream.write_failure
            return unit.index, unit.window, stream.hash.hexdigest()

    async def _move_batch(self, unit: Batch) -> list[WindowDigest]:
        # sizes in powers of two: buffers fit again
        async with self._pool.lease(1 << (unit.payload_bytes - 1).bit_length()) as buffer:
            bodies: list[memoryview] = []
            position = 0
            async with open_task_group() as tasks:
                for item in unit.members:
                    bodies.append(buffer[position : position + item.member.size_bytes])
                    position += item.member.size_bytes
                    tasks.start_soon(self._fetch, item.member, bodies[-1])
            return await anyio.to_thread.run_sync(self._write_batch, unit, bodies, limiter=self._lanes.disk)

    async def _fetch(self, member: Member | ManifestMember, view: memoryview) -> None:
        item = self._locate(member, 0, member.size_bytes)
        if item.object_bytes and not item.size_bytes:
            return  # an empty member of a datablock object: HTTP has no empty ranges

        async def attempt() -> None:
            async with self._lanes.requests:
                await self._lanes.reader.fetch(item, view)

        await self._lanes.retrying(attempt)
        self._counters.received_bytes += len(view)

    def _write_batch(self, unit: Batch, bodies: Sequence[Buffer]) -> list[WindowDigest]:
        digests, buffers = [], []
        for item, body in zip(unit.members, bodies, strict=True):
            digests.append((item.index, 0, digest_of(body)))
            buffers += [item.gap.content, body]
        buffers.append(unit.tail)
        self._sink.write_at(unit.offset_bytes, buffers)
        return digests


class _SliceStream:
    """Hashes and writes one window as its pieces arrive; knows how far it got."""

    def __init__(self, unit: Slice, sink: UnitSink) -> None:
        self.position = unit.start
        self.hash = WindowHash()
        self.write_failure: MoverError | None = None
        self._unit, self._sink = unit, sink

    def consume(self, piece: memoryview) -> None:
        # the offset follows from the position alone: whatever is repeated lands on its own place again
        offset_bytes = self._unit.offset_bytes + self.position - self._unit.start
        buffers: list[Buffer] = [piece]
        if self.position == self._unit.start:
            buffers.insert(0, self._unit.gap)
        else:
            offset_bytes += len(self._unit.gap)
        if self.position + len(piece) == self._unit.end and self._unit.tail:
            buffers.append(self._unit.tail)
        self._sink.write_at(offset_bytes, buffers)
        self.hash.update(piece)
        self.position += len(piece)


class _Checkpoints:
    """Makes windows durable in the right order: the bytes on the LTS first, then the digests in the journal."""

    def __init__(
        self,
        sink: PositionalSink,
        record: Callable[[Sequence[WindowDigest]], None],
        disk: anyio.CapacityLimiter,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._sink, self._record, self._disk, self._clock = sink, record, disk, clock
        self._pending: list[WindowDigest] = []
        self._pending_bytes = 0
        self._last_s = clock()
        self._lock = anyio.Lock()

    async def add(self, digests: Sequence[WindowDigest], size_bytes: int) -> None:
        self._pending += digests
        self._pending_bytes += size_bytes
        due = self._pending_bytes >= _CHECKPOINT_BYTES or self._clock() - self._last_s >= _CHECKPOINT_S
        if due and not self._lock.statistics().locked:
            await self.flush()

    async def flush(self) -> None:
        async with self._lock:
            digests, self._pending = self._pending, []
            self._pending_bytes = 0
            self._last_s = self._clock()
            if digests:
                await anyio.to_thread.run_sync(self._make_durable, digests, limiter=self._disk)

    def _make_durable(self, digests: Sequence[WindowDigest]) -> None:
        self._sink.checkpoint()
        self._record(digests)


def _window_bytes(datablock: Datablock | Manifest, windows: dict[WindowKey, str]) -> int:
    ranges = (window_range(datablock.members[index].size_bytes, window) for index, window in windows)
    return sum(end - start for start, end in ranges)
