"""From a listing to a plan: which file goes where, to the byte, before anything moves.

Pure apart from consuming its two iterators, and deterministic: the same objects give the same plan in whatever order
they are listed. Linear in the number of objects; an object of the plan costs a few hundred bytes. Long stretches of
work give way to other tasks every few milliseconds.
"""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator, Iterable, Iterator
from itertools import pairwise
from operator import attrgetter

import anyio.lowlevel
import msgspec
import xxhash

from mover.errors import DatasetNotFoundError, HostileNameError, MissingFilesError
from mover.model import (
    FORMAT_VERSION,
    WINDOW_BYTES,
    Anomaly,
    CatalogueFile,
    Datablock,
    DatasetPlan,
    Manifest,
    Member,
    SourceChecksum,
    SourceObject,
)
from mover.policies.expected import ExpectedFiles
from mover.policies.names import CollisionGuard, check_dataset_id, check_path, has_long_segment
from mover.policies.packing import Packer, catalogue_entry_bytes
from mover.streams.tar import datablock_size_bytes, header_size_bytes, padding_bytes

__all__ = ["Differences", "compare_with_manifests", "plan_dataset"]

_YIELD_EVERY = 2_000  # objects between two checkpoints: a few milliseconds
_RUN_OBJECTS = 10_000  # longest run that is sorted at once, in a few milliseconds

_by_path = attrgetter("path")


async def plan_dataset(
    dataset_id: str,
    objects: AsyncIterator[SourceObject],
    *,
    target_bytes: int,
    listed_files: AsyncIterator[CatalogueFile] | None = None,
    where: str,
) -> DatasetPlan:
    """What archiving the dataset writes. Each iterator is consumed once.

    Args:
        dataset_id: the PID.
        objects: the listing of the landing zone, paths relative to the dataset's ``raw_files/``, in any order.
        target_bytes: payload that a datablock is filled up to.
        listed_files: the catalogue's list. When given, it decides what is archived, and its times are kept: objects
            that it does not name are left alone and reported as anomalies.
        where: what error messages call the place of the listing.

    Raises:
        HostileNameError: a name that cannot be archived, or two that cannot be unpacked side by side.
        MissingFilesError: listed files without an object, or of another size.
        DatasetNotFoundError: there is no object, and no catalogue that says it is so; or objects, and an empty list.
    """
    check_dataset_id(dataset_id)
    expected = None if listed_files is None else await _expected_files(listed_files)
    listing = _Listing(expected)
    await listing.collect(objects)
    listing.check_complete(dataset_id, where)
    assembly = _Assembly(dataset_id, target_bytes)
    for position, item in enumerate(listing.drain(), 1):
        assembly.add(item)
        if position % _YIELD_EVERY == 0:
            await anyio.lowlevel.checkpoint()
    anomalies = listing.anomalies if expected is None else listing.anomalies + expected.anomalies
    return assembly.finish(anomalies + assembly.anomalies, {} if expected is None else expected.checksums)


async def _expected_files(listed_files: AsyncIterator[CatalogueFile]) -> ExpectedFiles:
    expected = ExpectedFiles()
    position = 0
    async for entry in listed_files:
        expected.add(entry)
        position += 1
        if position % _YIELD_EVERY == 0:
            await anyio.lowlevel.checkpoint()
    return expected


class _Listing:
    """Objects to archive, kept as sorted runs: a listing in path order, the usual case, needs no sorting at all."""

    def __init__(self, expected: ExpectedFiles | None) -> None:
        self._expected = expected
        self._runs: list[list[SourceObject]] = [[]]
        self._extras: set[str] = set()
        self.anomalies: list[Anomaly] = []

    async def collect(self, objects: AsyncIterator[SourceObject]) -> None:
        position = 0
        async for item in objects:
            self._add(item)
            position += 1
            if position % _YIELD_EVERY == 0:
                await anyio.lowlevel.checkpoint()

    def _add(self, item: SourceObject) -> None:
        path = item.path
        if item.size_bytes == 0 and (not path or path.endswith("/")):
            if path:
                check_path(path[:-1])
            self.anomalies.append(Anomaly("directory-marker", path, "an empty object that stands for a folder"))
            return
        check_path(path)
        wanted = item if self._expected is None else self._expected.take(item)
        if wanted is None:
            if path not in self._extras:
                self._extras.add(path)
                self.anomalies.append(Anomaly("extra-object", path, "the catalogue does not list it; not archived"))
            return
        if len(self._runs[-1]) >= _RUN_OBJECTS:
            self._close_run()
        self._runs[-1].append(wanted)

    def _close_run(self) -> None:
        self._runs[-1].sort(key=_by_path)
        self._runs.append([])

    def check_complete(self, dataset_id: str, where: str) -> None:
        expected = self._expected
        if expected is None:
            if not self._runs[0]:
                raise DatasetNotFoundError(dataset_id, where)
            return
        if expected.is_empty and self._extras:
            place = f"the catalogue's list of files, but {len(self._extras):,} objects at {where}"
            raise DatasetNotFoundError(dataset_id, place)
        missing = expected.missing()
        if missing or expected.contradictory:
            raise MissingFilesError(dataset_id, missing, sorted(expected.contradictory))

    def drain(self) -> Iterator[SourceObject]:
        """All objects in byte order of their paths; lets go of each as it passes."""
        self._runs[-1].sort(key=_by_path)
        runs = [run for run in self._runs if run]
        self._runs = [[]]
        ordered = all(before[-1].path < after[0].path for before, after in pairwise(runs))
        for run in runs:
            run.reverse()
        streams = (_pop_all(run) for run in runs)
        merged = (item for stream in streams for item in stream) if ordered else heapq.merge(*streams, key=_by_path)
        for item in merged:
            if item.path in self._extras:  # its first appearance used the catalogue's entry up
                raise HostileNameError(item.path, "it is listed twice")
            yield item


def _pop_all(reversed_run: list[SourceObject]) -> Iterator[SourceObject]:
    while reversed_run:
        yield reversed_run.pop()


class _Assembly:
    """Turns objects in path order into datablocks."""

    def __init__(self, dataset_id: str, target_bytes: int) -> None:
        self._dataset_id = dataset_id
        self._packer = Packer(target_bytes)
        self._guard = CollisionGuard()
        self._digest = xxhash.xxh3_128(f"{FORMAT_VERSION}\0{target_bytes}\0{WINDOW_BYTES}\0".encode())
        self._members: list[Member] = []
        self._offset_bytes = 0
        self._datablocks: list[Datablock] = []
        self.anomalies: list[Anomaly] = []

    def add(self, item: SourceObject) -> None:
        path, size_bytes = item.path, item.size_bytes
        self._guard.add(path)
        if has_long_segment(path):
            self.anomalies.append(Anomaly("long-name", path, "usual file systems cannot unpack a name over 255 bytes"))
        entry_bytes = catalogue_entry_bytes(path)
        if not self._packer.fits(size_bytes, entry_bytes):
            self._close()
        self._packer.add(size_bytes, entry_bytes)
        header_bytes = header_size_bytes(path, size_bytes, item.mtime_s)
        self._members.append(Member(path, size_bytes, item.etag, item.mtime_s, self._offset_bytes, header_bytes))
        self._offset_bytes += header_bytes + size_bytes + padding_bytes(size_bytes)
        self._digest.update(f"{path}\0{size_bytes}\0{item.etag}\0{item.mtime_s}\0".encode())

    def _close(self) -> None:
        size_bytes = datablock_size_bytes(self._offset_bytes)
        number = len(self._datablocks) + 1
        members = tuple(self._members)
        self._datablocks.append(Datablock(self._dataset_id, number, members, self._packer.payload_bytes, size_bytes))
        self._digest.update(f"\0{size_bytes}\0".encode())  # no path is empty: this ends a datablock
        self._packer.start()
        self._members = []
        self._offset_bytes = 0

    def finish(self, anomalies: list[Anomaly], checksums: dict[str, SourceChecksum]) -> DatasetPlan:
        if self._members:
            self._close()
        return DatasetPlan(
            dataset_id=self._dataset_id,
            datablocks=tuple(self._datablocks),
            fingerprint=self._digest.hexdigest(),
            file_count=sum(len(datablock.members) for datablock in self._datablocks),
            payload_bytes=sum(datablock.payload_bytes for datablock in self._datablocks),
            size_bytes=sum(datablock.size_bytes for datablock in self._datablocks),
            anomalies=tuple(sorted(anomalies, key=lambda anomaly: (anomaly.path, anomaly.kind))),
            checksums=checksums,
        )


class Differences(msgspec.Struct, frozen=True):
    """How a plan differs from what is archived; paths in byte order.

    ``complete``: the manifests are all of their dataset's. When they are not, ``added`` also holds what was still to be
    archived when they were written.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    complete: bool

    @property
    def none(self) -> bool:
        """Whether the plan names exactly what is archived."""
        return not (self.added or self.removed or self.changed)


def compare_with_manifests(plan: DatasetPlan, manifests: Iterable[Manifest]) -> Differences:
    """Compares path, size and ETag of the plan's members with those of ``manifests``.

    Linear, and at a million members worth a worker thread.
    """
    pending = {member.path: member for datablock in plan.datablocks for member in datablock.members}
    removed, changed = [], []
    numbers: set[int] = set()
    expected = 0
    for manifest in manifests:
        numbers.add(manifest.number)
        expected = max(expected, manifest.datablock_count)
        for archived in manifest.members:
            member = pending.pop(archived.path, None)
            if member is None:
                removed.append(archived.path)
            elif (member.size_bytes, member.etag) != (archived.size_bytes, archived.etag):
                changed.append(archived.path)
    added, complete = tuple(sorted(pending)), len(numbers) == expected > 0
    return Differences(added, tuple(sorted(removed)), tuple(sorted(changed)), complete)
