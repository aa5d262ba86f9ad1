"""One datablock's way to the LTS: space → move → verify → manifest. Each step is durable before the next begins."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import anyio
import anyio.to_thread
import msgspec

from mover.errors import DigestMismatchError
from mover.journal import DatablockJournal
from mover.model import (
    Datablock,
    DatasetPlan,
    Evidence,
    Manifest,
    ManifestMember,
    Member,
    SourceChecksum,
    Stage,
    raw_object_key,
    window_count,
)
from mover.parts import Parts
from mover.policies.space import Reservation
from mover.proof import claimed_checksums, describe, read_back_datablock, real_breaks
from mover.reports import ByteCounters, DatablockReport
from mover.staging import empty_staging, stage_datablock
from mover.streams.hashing import ALGORITHM
from mover.streams.interfaces import ByteRange
from mover.streams.lts import LtsFolder
from mover.streams.lts_writer import LtsWriter
from mover.streams.pipe import Locate, Move
from mover.streams.units import WindowKey
from mover.verify import ReadBackResult, raise_breaks

__all__ = ["DatablockRun", "from_landing_zone", "move_counters"]


def from_landing_zone(bucket: str, dataset_id: str) -> Locate:
    """Bytes of members come from their own objects."""

    def locate(member: Member | ManifestMember, start: int, end: int) -> ByteRange:
        key = raw_object_key(dataset_id, member.path)
        return ByteRange(bucket, key, member.etag, member.size_bytes, start, end)

    return locate


class DatablockRun:
    """The forward steps of one datablock. The caller holds the dataset."""

    def __init__(
        self, parts: Parts, folder: LtsFolder, plan: DatasetPlan, datablock: Datablock, target_bytes: int
    ) -> None:
        self._parts, self._folder, self._plan, self._datablock = parts, folder, plan, datablock
        self._target_bytes = target_bytes
        self._counters = ByteCounters()
        self._times = {"wait": 0.0, "move": 0.0, "verify": 0.0}
        self._resumed = False

    async def run(self) -> tuple[Manifest, DatablockReport]:
        """All steps; returns the manifest that was written.

        Raises:
            MoverError: a step failed; the next run goes on from what is durable.
        """
        parts, datablock = self._parts, self._datablock
        journal = await parts.on_lts(parts.journal.open, datablock.dataset_id, datablock.number)
        try:
            windows = await self._moved_before(journal)
            if windows is None:
                windows = await self._move(journal)
            checksums = await claimed_checksums(parts, self._plan, datablock)
            evidence, windows = await self._verify(journal, windows, checksums)
            manifest, data = await anyio.to_thread.run_sync(self._manifest, windows, checksums, evidence)
            await parts.on_lts(self._folder.write_manifest, datablock.name, data)
            if parts.staging:
                await empty_staging(parts, manifest)
        finally:
            with anyio.CancelScope(shield=True):
                await parts.on_lts(journal.close)
        return manifest, self._report(evidence)

    async def _moved_before(self, journal: DatablockJournal) -> dict[WindowKey, str] | None:
        """The windows' digests when an earlier run gave this very file its final name and lacked only the read-back."""
        state, datablock = journal.state, self._datablock
        if not state.describes(self._plan.fingerprint, datablock.size_bytes) or not state.moved_id:
            return None
        found = await self._parts.on_lts(self._folder.datablock_id, datablock.name)
        if found != (state.moved_id, datablock.size_bytes) or len(state.windows) != _window_total(datablock):
            return None
        self._resumed = True
        self._counters.reused_bytes = datablock.payload_bytes
        return dict(state.windows)

    async def _move(self, journal: DatablockJournal) -> dict[WindowKey, str]:
        began = anyio.current_time()
        async with self._admitted() as reservation:
            locate, received = await self._source(journal)

            async def write() -> dict[WindowKey, str]:
                self._times["wait"] = anyio.current_time() - began
                return await self._write(journal, locate, received, reservation)

            limit = self._parts.limits.move_to_lts
            return await self._parts.limited(limit, Stage.MOVE, self._datablock.name, write)

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[Reservation]:
        """Space on the LTS; what an interrupted run left there is not counted again."""
        parts, datablock = self._parts, self._datablock
        announcer = parts.announcer(datablock.dataset_id, Stage.SPACE, datablock.number, datablock.size_bytes)
        taken_bytes = await parts.on_lts(self._folder.taken_bytes, datablock.name)
        async with AsyncExitStack() as stack:

            async def admit() -> Reservation:
                admission = parts.space.admit(max(datablock.size_bytes - taken_bytes, 0), announcer.waiting)
                return await stack.enter_async_context(admission)

            yield await parts.limited(parts.limits.lts_free, Stage.SPACE, datablock.name, admit)

    async def _source(self, journal: DatablockJournal) -> tuple[Locate, Mapping[WindowKey, str]]:
        """Where the bytes come from, and the digests that they had when they left the landing zone, if known."""
        parts, dataset_id = self._parts, self._datablock.dataset_id
        landing_zone = from_landing_zone(parts.buckets.landing_zone, dataset_id)
        if not parts.staging:
            return landing_zone, {}
        return await stage_datablock(parts, self._plan, self._datablock, journal, landing_zone, self._counters)

    async def _write(
        self,
        journal: DatablockJournal,
        locate: Locate,
        received: Mapping[WindowKey, str],
        reservation: Reservation | None,
    ) -> dict[WindowKey, str]:
        parts, datablock, state = self._parts, self._datablock, journal.state
        began = anyio.current_time()
        resume = state.describes(self._plan.fingerprint, datablock.size_bytes)
        opening = partial(self._folder.open_writer, datablock.name, datablock.size_bytes, resume=resume)
        writer: LtsWriter = await parts.on_lts(opening)
        try:
            durable = dict(state.windows) if resume and writer.resumed and writer.file_id == state.file_id else {}
            self._resumed = self._resumed or bool(durable)
            await parts.on_lts(journal.begin, self._plan.fingerprint, datablock.size_bytes, writer.file_id)
            move = Move(datablock, writer, parts.lanes, locate, journal.add_windows, durable)
            await self._run_move(move, writer, reservation)
            await self._compare_with_received(journal, move.digests, received)
            # The rename keeps the inode: recorded before it, so that no instant loses what is durable.
            await parts.on_lts(journal.moved, writer.inode)
            await parts.on_lts(writer.commit)
        finally:
            with anyio.CancelScope(shield=True):
                await parts.on_lts(writer.close)
        self._times["move"] += anyio.current_time() - began
        return move.digests

    async def _run_move(self, move: Move, writer: LtsWriter, reservation: Reservation | None) -> None:
        parts, datablock = self._parts, self._datablock
        stage = parts.announcer(datablock.dataset_id, Stage.MOVE, datablock.number, datablock.size_bytes)
        if reservation is not None and writer.allocated:
            reservation.shrink_to(0)

        def done_bytes() -> int:
            if reservation is not None:
                reservation.shrink_to(reservation.size_bytes - writer.written_bytes)
            return move.counters.reused_bytes + writer.written_bytes

        try:
            async with stage.following(done_bytes):
                await move.run()
            parts.tally.add(Stage.MOVE, len(datablock.members))
        finally:
            self._counters.add(move_counters(move, writer, staging=parts.staging))

    async def _compare_with_received(
        self, journal: DatablockJournal, digests: Mapping[WindowKey, str], received: Mapping[WindowKey, str]
    ) -> None:
        for (index, window), expected in received.items():
            if digests[index, window] != expected:
                await self._parts.on_lts(journal.begin_staging, "")  # the next run puts the copy together anew
                await self._parts.on_lts(journal.forget_windows, [(index, window)])
                where = f"{self._datablock.name}, member {self._datablock.members[index].path!r}, window {window}"
                raise DigestMismatchError(where, ALGORITHM, expected, digests[index, window], "the staging bucket")

    async def _verify(
        self, journal: DatablockJournal, windows: dict[WindowKey, str], checksums: dict[str, SourceChecksum]
    ) -> tuple[Evidence, dict[WindowKey, str]]:
        """Reads back; what is broken is fetched and written once more. Removes claims that turn out to be none."""
        parts, datablock = self._parts, self._datablock
        if parts.wait_before_verify_s:
            announcer = parts.announcer(datablock.dataset_id, Stage.VERIFY, datablock.number, datablock.size_bytes)
            announcer.waiting(f"{parts.wait_before_verify_s:g} s before the read-back, as configured")
            await anyio.sleep(parts.wait_before_verify_s)
        for repaired in (False, True):
            evidence, result = await self._read_back(windows, checksums)
            breaks = await real_breaks(parts, datablock.dataset_id, result, checksums)
            if not breaks:
                return evidence, windows
            parts.tally.mismatches[Stage.VERIFY] += 1
            await parts.on_lts(journal.forget_windows, [key for broken in breaks for key in broken.windows])
            if parts.profile.rename:  # also before giving up: the next run then fetches only what is broken
                await parts.on_lts(journal.renamed, await parts.on_lts(self._folder.withdraw, datablock.name))
            if repaired or not parts.profile.rename:
                raise_breaks(breaks)
            locate, received = await self._source(journal)
            write = partial(self._write, journal, locate, received, None)
            windows = await parts.limited(parts.limits.move_to_lts, Stage.MOVE, datablock.name, write)
        raise AssertionError  # the loop returns or raises

    async def _read_back(
        self, windows: Mapping[WindowKey, str], checksums: Mapping[str, SourceChecksum]
    ) -> tuple[Evidence, ReadBackResult]:
        parts, datablock = self._parts, self._datablock
        queued = anyio.current_time()

        async def read_back() -> tuple[Evidence, ReadBackResult]:
            began = anyio.current_time()
            self._times["wait"] += began - queued
            proof = await read_back_datablock(parts, self._folder, datablock, windows, checksums)
            self._times["verify"] += anyio.current_time() - began
            return proof

        proof = await parts.limited(parts.limits.verify_lts, Stage.VERIFY, datablock.name, read_back)
        self._counters.lts_read_bytes += datablock.size_bytes
        return proof

    def _manifest(
        self, windows: Mapping[WindowKey, str], checksums: Mapping[str, SourceChecksum], evidence: Evidence
    ) -> tuple[Manifest, bytes]:
        manifest = describe(
            self._plan,
            self._datablock,
            windows,
            checksums,
            evidence,
            target_bytes=self._target_bytes,
            bucket=self._parts.buckets.landing_zone,
        )
        return manifest, msgspec.json.encode(manifest)

    def _report(self, evidence: Evidence) -> DatablockReport:
        datablock = self._datablock
        return DatablockReport(
            number=datablock.number,
            name=datablock.name,
            size_bytes=datablock.size_bytes,
            payload_bytes=datablock.payload_bytes,
            members=len(datablock.members),
            outcome="resumed" if self._resumed else "written",
            digest=evidence.digest,
            evidence=evidence.level,
            wait_s=self._times["wait"],
            move_s=self._times["move"],
            verify_s=self._times["verify"],
            counters=self._counters,
        )


def move_counters(move: Move, writer: LtsWriter, *, staging: bool) -> ByteCounters:
    """What one move adds to the report."""
    received_bytes = move.counters.received_bytes
    return ByteCounters(
        landing_zone_read_bytes=0 if staging else received_bytes,
        staging_read_bytes=received_bytes if staging else 0,
        lts_written_bytes=writer.written_bytes,
        reused_bytes=move.counters.reused_bytes,
    )


def _window_total(datablock: Datablock) -> int:
    return sum(window_count(member.size_bytes) for member in datablock.members)
