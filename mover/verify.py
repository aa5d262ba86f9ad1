"""Read back and compare: every byte of a datablock, in order, against the plan and against what was received."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import NoReturn, Protocol

import anyio
import anyio.to_thread
import msgspec

from mover.errors import DigestMismatchError, LayoutMismatchError
from mover.model import (
    Datablock,
    Manifest,
    ManifestMember,
    Member,
    SourceChecksum,
    datablock_name,
    window_count,
    window_range,
)
from mover.streams.checksums import open_checksum
from mover.streams.hashing import ALGORITHM, WindowHash
from mover.streams.memory import BufferPool
from mover.streams.tar import structure
from mover.streams.units import WindowKey
from mover.tasks import open_task_group

__all__ = ["BlockReader", "Break", "ReadBack", "ReadBackResult", "raise_breaks", "read_back"]

_READ_BYTES = 4 << 20

_Walk = Generator[int, memoryview, None]


class BlockReader(Protocol):
    """What a read-back needs of an opened datablock."""

    async def read(self, offset_bytes: int, view: memoryview, stall_timeout_s: float) -> None:
        """Fills ``view`` from ``offset_bytes``, all of it. Raises LtsError, also when no byte comes for so long."""
        ...


class Break(msgspec.Struct, frozen=True):
    """One place where the chain of digests broke. ``windows`` are those that would have to be fetched again."""

    where: str
    path: str  # of the member
    algorithm: str
    expected: str
    found: str
    side: str
    windows: tuple[WindowKey, ...]


class ReadBackResult(msgspec.Struct, frozen=True):
    """What a read-back saw: the digest of the file, each window's, and the breaks (none: proved)."""

    digest: str
    windows: dict[WindowKey, str]
    breaks: tuple[Break, ...]


class ReadBack:
    """Takes a datablock's bytes in order and compares them with what they have to be. No I/O; call it in a thread."""

    def __init__(
        self,
        datablock: Datablock | Manifest,
        expected: Mapping[WindowKey, str],
        checksums: Mapping[str, SourceChecksum],
    ) -> None:
        """Prepares the comparison.

        Args:
            datablock: the plan or the manifest.
            expected: digest of each window as received; a window without one is hashed, not compared.
            checksums: what the source claims for whole members, by path.
        """
        self._name = datablock_name(datablock.dataset_id, datablock.number)
        self._datablock, self._expected, self._checksums = datablock, expected, checksums
        self.fed_bytes = 0
        self._whole = WindowHash()
        self._windows: dict[WindowKey, str] = {}
        self._breaks: list[Break] = []
        self._broken: set[WindowKey] = set()
        self._walk = self._compare()
        self._wanted = next(self._walk)

    def feed(self, view: memoryview) -> None:
        """The next bytes of the file, in pieces of any length.

        Raises:
            LayoutMismatchError: the file goes on after its planned end.
        """
        self._whole.update(view)
        self.fed_bytes += len(view)
        while view:
            piece, view = view[: self._wanted], view[self._wanted :]
            try:
                self._wanted = self._walk.send(piece)
            except StopIteration:
                if view:
                    raise LayoutMismatchError(self._name, "end", 0, len(view)) from None
                self._wanted = 0
                return

    def finish(self) -> ReadBackResult:
        """The result after the last byte.  Raises LayoutMismatchError when bytes are missing."""
        if self._wanted:
            raise LayoutMismatchError(self._name, "bytes missing at the end", 0, self._wanted)
        return ReadBackResult(self._whole.hexdigest(), self._windows, tuple(self._breaks))

    def _compare(self) -> _Walk:
        """Yields how many bytes it wants next at most, is sent as many or fewer, in order."""
        pieces = structure(self._datablock)
        members: Sequence[Member | ManifestMember] = self._datablock.members
        last: WindowKey = (0, 0)
        for index, member in enumerate(members):
            yield from self._structure(next(pieces).content, (index, 0))
            yield from self._member(index, member)
            last = (index, window_count(member.size_bytes) - 1)
        yield from self._structure(next(pieces).content, last)

    def _structure(self, content: bytes, key: WindowKey) -> _Walk:
        """Compares tar structure; ``key`` is the window that is written together with it."""
        position, intact = 0, True
        while position < len(content):
            piece = yield len(content) - position
            intact = intact and piece == content[position : position + len(piece)]
            position += len(piece)
        if not intact:
            path = self._datablock.members[key[0]].path
            where = f"{self._name}, tar structure at member {path!r}"
            self._break(Break(where, path, "bytes", "the planned ones", "others", "the LTS", (key,)))

    def _member(self, index: int, member: Member | ManifestMember) -> _Walk:
        claimed = self._checksums.get(member.path)
        checksum = open_checksum(claimed) if claimed is not None else None
        for window in range(window_count(member.size_bytes)):
            start, end = window_range(member.size_bytes, window)
            digest = WindowHash()
            while start < end:
                piece = yield end - start
                digest.update(piece)
                if checksum is not None:
                    checksum.update(piece)
                start += len(piece)
            self._compare_window(index, member, window, digest.hexdigest())
        if claimed is not None and checksum is not None:
            self._compare_checksum(index, member, claimed, checksum.hexdigest())

    def _compare_window(self, index: int, member: Member | ManifestMember, window: int, found: str) -> None:
        self._windows[index, window] = found
        expected = self._expected.get((index, window), found)
        if found != expected:
            where = f"{self._name}, member {member.path!r}, window {window}"
            self._break(Break(where, member.path, ALGORITHM, expected, found, "the LTS", ((index, window),)))

    def _compare_checksum(
        self, index: int, member: Member | ManifestMember, claimed: SourceChecksum, found: str
    ) -> None:
        if found == claimed.value:
            return
        windows = tuple((index, window) for window in range(window_count(member.size_bytes)))
        if self._broken.isdisjoint(windows):
            where = f"{self._name}, member {member.path!r}"
            side = f"between the source ({claimed.origin}) and this host: the bytes were received like this"
            self._break(Break(where, member.path, claimed.algorithm, claimed.value, found, side, windows))

    def _break(self, broken: Break) -> None:
        self._breaks.append(broken)
        self._broken.update(broken.windows)


async def read_back(
    reader: BlockReader,
    comparison: ReadBack,
    size_bytes: int,
    pool: BufferPool,
    *,
    stall_timeout_s: float,
) -> ReadBackResult:
    """Reads a datablock from its first to its last byte, one buffer ahead of the comparison.

    Raises:
        LayoutMismatchError: as of ``ReadBack``.
        LtsError: the file cannot be read.
    """
    buffer_bytes = min(_READ_BYTES, size_bytes)
    async with pool.lease(2 * buffer_bytes) as both:  # one lease: two could wait for each other's
        current, ahead = both[:buffer_bytes], both[buffer_bytes:]
        filled = min(buffer_bytes, size_bytes)
        await reader.read(0, current[:filled], stall_timeout_s)
        position = filled
        while filled:
            following = min(buffer_bytes, size_bytes - position)
            async with open_task_group() as tasks:
                if following:
                    tasks.start_soon(reader.read, position, ahead[:following], stall_timeout_s)
                await anyio.to_thread.run_sync(comparison.feed, current[:filled])
            position += following
            current, ahead, filled = ahead, current, following
    return comparison.finish()


def raise_breaks(breaks: Sequence[Break]) -> NoReturn:
    """Raises DigestMismatchError for the first break, with the others as notes."""
    first, *others = breaks
    error = DigestMismatchError(first.where, first.algorithm, first.expected, first.found, first.side)
    for other in others:
        error.add_note(f"besides: {other.where}")
    raise error
