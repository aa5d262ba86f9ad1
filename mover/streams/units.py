"""How a datablock is cut into units of work: each is fetched, hashed and written as one, at its own offset."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import msgspec

from mover.model import Datablock, Manifest, ManifestMember, Member, window_count, window_range
from mover.streams.tar import TarPiece, structure

__all__ = ["BATCH_BYTES", "BATCH_MEMBERS", "SMALL_BYTES", "Batch", "BatchMember", "Slice", "WindowKey", "cut"]

SMALL_BYTES = 256 << 10
"""Members up to this size are fetched whole, many at a time; larger ones stream in windows. Beside its body, a request
in flight costs up to a MiB in the library, so larger bodies do better in the reused buffers of a few threads."""

BATCH_BYTES = 4 << 20
BATCH_MEMBERS = 64
"""A batch of small members ends at either bound: one write, one entry in the journal, few enough to keep order."""

WindowKey = tuple[int, int]
"""(index of the member in its datablock, number of the window in its member)"""


class BatchMember(msgspec.Struct, frozen=True, gc=False):
    """A small member and the tar structure right before its payload."""

    index: int
    member: Member | ManifestMember
    gap: TarPiece


class Batch(msgspec.Struct, frozen=True):
    """Small members in a row; ``tail`` is the end of the archive when the last member is among them."""

    members: tuple[BatchMember, ...]
    tail: bytes

    @property
    def offset_bytes(self) -> int:
        """Where the batch begins in the datablock."""
        return self.members[0].gap.offset_bytes

    @property
    def payload_bytes(self) -> int:
        """Bytes to fetch."""
        return sum(item.member.size_bytes for item in self.members)

    @property
    def size_bytes(self) -> int:
        """Bytes in the datablock, tar structure included."""
        return sum(len(item.gap.content) for item in self.members) + self.payload_bytes + len(self.tail)


class Slice(msgspec.Struct, frozen=True):
    """One window of a large member, with the tar structure that touches it."""

    index: int
    member: Member | ManifestMember
    window: int
    gap: bytes  # before the first window
    tail: bytes  # after the last window of the last member
    offset_bytes: int  # of the gap, or of the window where it has none

    @property
    def payload_bytes(self) -> int:
        """Bytes to fetch."""
        return self.end - self.start

    @property
    def size_bytes(self) -> int:
        """Bytes in the datablock, tar structure included."""
        return len(self.gap) + self.payload_bytes + len(self.tail)

    @property
    def start(self) -> int:
        """First byte of the window within the member."""
        return window_range(self.member.size_bytes, self.window)[0]

    @property
    def end(self) -> int:
        """Byte after the window's last, within the member."""
        return window_range(self.member.size_bytes, self.window)[1]


def cut(datablock: Datablock | Manifest, done: Collection[WindowKey] = ()) -> Iterator[Batch | Slice]:
    """The units of a datablock in the order of their offsets, without the windows in ``done``.

    Every byte of the file belongs to exactly one unit: a member's first window brings the padding of the member before
    and its own header along, the last window of all brings the end of the archive.

    Raises:
        LayoutMismatchError: the offsets in ``datablock`` are not those of the layout.
    """
    pieces = structure(datablock)
    members: Sequence[Member | ManifestMember] = datablock.members
    last = len(members) - 1
    batch: list[BatchMember] = []
    batch_bytes = 0
    for index, member in enumerate(members):
        gap = next(pieces)
        small = member.size_bytes <= SMALL_BYTES
        skipped = small and (index, 0) in done
        full = len(batch) == BATCH_MEMBERS or batch_bytes + member.size_bytes > BATCH_BYTES
        if batch and (full or skipped or not small):
            yield Batch(tuple(batch), b"")
            batch, batch_bytes = [], 0
        tail = next(pieces).content if index == last else b""
        if not small:
            yield from _slices(index, member, gap, tail, done)
        elif not skipped:
            batch.append(BatchMember(index, member, gap))
            batch_bytes += member.size_bytes
            if index == last:
                yield Batch(tuple(batch), tail)


def _slices(
    index: int, member: Member | ManifestMember, gap: TarPiece, tail: bytes, done: Collection[WindowKey]
) -> Iterator[Slice]:
    count = window_count(member.size_bytes)
    for window in range(count):
        if (index, window) not in done:
            first, last = window == 0, window == count - 1
            start, _ = window_range(member.size_bytes, window)
            offset_bytes = gap.offset_bytes if first else gap.end_bytes + start
            yield Slice(index, member, window, gap.content if first else b"", tail if last else b"", offset_bytes)
