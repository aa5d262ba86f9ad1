"""One datablock's way to the LTS: wait for space → move → verify → manifest. Each step is durable before the next begins."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import anyio
import anyio.to_thread
import msgspec

from mover import __version__
from mover.errors import DigestMismatchError, LtsError
from mover.journal import DatablockJournal
from mover.model import (
    Datablock,
    DatasetPlan,
    Evidence,
    EvidenceLevel,
    Manifest,
    ManifestMember,
    Member,
    SourceChecksum,
    Stage,
    archive_id,
    datablock_name,
    raw_files_prefix,
    raw_object_key,
    window_count,
)
from mover.parts import Parts, now_iso
from mover.policies.space import Reservation
from mover.reports import ByteCounters, DatablockReport
from mover.staging import empty_staging, stage_datablock
from mover.streams.hashing import ALGORITHM, labelled
from mover.streams.interfaces import ByteRange
from mover.streams.lts import LtsFolder
from mover.streams.lts_read import open_when_online
from mover.streams.lts_writer import LtsWriter
from mover.streams.pipe import Locate, Move
from mover.streams.units import WindowKey
from mover.tasks import open_task_group
from mover.verify import Break, ReadBack, ReadBackResult, raise_breaks, read_back

__all__ = ["DatablockRun", "from_landing_zone", "move_counters", "read_back_datablock"]

_CHECKSUM_LOOKUPS = 8


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
            checksums = await self._source_checksums()
            evidence, windows = await self._verify(journal, windows, checksums)
            manifest = self._manifest(windows, checksums, evidence)
            data = await anyio.to_thread.run_sync(msgspec.json.encode, manifest)
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
            async with self._parts.limits.move_to_lts.slot(self._datablock.name):
                self._times["wait"] = anyio.current_time() - began
                return await self._write(journal, locate, received, reservation)

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[Reservation]:
        """Space on the LTS; what an interrupted run left there is not counted again."""
        parts, datablock = self._parts, self._datablock
        announcer = parts.announcer(datablock.dataset_id, Stage.SPACE, datablock.number, datablock.size_bytes)
        taken_bytes = await parts.on_lts(self._folder.taken_bytes, datablock.name)
        async with AsyncExitStack() as stack:
            async with parts.limits.lts_free.slot(datablock.name):
                admission = parts.space.admit(max(datablock.size_bytes - taken_bytes, 0), announcer.waiting)
                reservation = await stack.enter_async_context(admission)
            yield reservation

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
            self._compare_with_received(move.digests, received)
            await parts.on_lts(writer.commit)
            await parts.on_lts(journal.moved, await parts.on_lts(self._folder.datablock_id, datablock.name))
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
        finally:
            self._counters.add(move_counters(move, writer, staging=parts.staging))

    def _compare_with_received(self, digests: Mapping[WindowKey, str], received: Mapping[WindowKey, str]) -> None:
        for (index, window), expected in received.items():
            if digests[index, window] != expected:
                where = f"{self._datablock.name}, member {self._datablock.members[index].path!r}, window {window}"
                raise DigestMismatchError(where, ALGORITHM, expected, digests[index, window], "the staging bucket")

    async def _source_checksums(self) -> dict[str, SourceChecksum]:
        """What the catalogue, or else the S3 server, claims for each member."""
        parts, datablock = self._parts, self._datablock
        bucket, known = parts.buckets.landing_zone, self._plan.checksums
        members = iter(datablock.members)
        found: dict[str, SourceChecksum] = {}

        async def look_up() -> None:
            for member in members:
                key = raw_object_key(datablock.dataset_id, member.path)
                checksum = known.get(member.path) or await parts.store.source_checksum(
                    bucket, key, member.etag, member.size_bytes
                )
                if checksum is not None:
                    found[member.path] = checksum

        async with open_task_group() as tasks:
            for _ in range(_CHECKSUM_LOOKUPS):
                tasks.start_soon(look_up)
        return found

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
            breaks = await self._real_breaks(result, checksums)
            if not breaks:
                return evidence, windows
            await parts.on_lts(journal.forget_windows, [key for broken in breaks for key in broken.windows])
            if repaired or not parts.profile.rename:
                raise_breaks(breaks)
            await parts.on_lts(journal.renamed, await parts.on_lts(self._folder.withdraw, datablock.name))
            locate, received = await self._source(journal)
            async with parts.limits.move_to_lts.slot(datablock.name):
                windows = await self._write(journal, locate, received, None)
        raise AssertionError  # the loop returns or raises

    async def _read_back(
        self, windows: Mapping[WindowKey, str], checksums: Mapping[str, SourceChecksum]
    ) -> tuple[Evidence, ReadBackResult]:
        parts, datablock = self._parts, self._datablock
        queued = anyio.current_time()
        async with parts.limits.verify_lts.slot(datablock.name):
            began = anyio.current_time()
            self._times["wait"] += began - queued
            proof = await read_back_datablock(parts, self._folder, datablock, windows, checksums)
            self._times["verify"] += anyio.current_time() - began
        self._counters.lts_read_bytes += datablock.size_bytes
        return proof

    async def _real_breaks(self, result: ReadBackResult, checksums: dict[str, SourceChecksum]) -> list[Break]:
        """Breaks without those of ETags that turn out not to be MD5s, as of objects that the server encrypts."""
        parts, real = self._parts, []
        for broken in result.breaks:
            claimed = checksums.get(broken.path) if broken.algorithm != ALGORITHM else None
            if claimed is not None and claimed.origin == "s3-etag":
                key = raw_object_key(self._datablock.dataset_id, broken.path)
                if not await parts.store.etag_is_md5(parts.buckets.landing_zone, key):
                    del checksums[broken.path]
                    continue
            real.append(broken)
        return real

    def _manifest(
        self, windows: Mapping[WindowKey, str], checksums: Mapping[str, SourceChecksum], evidence: Evidence
    ) -> Manifest:
        plan, datablock, bucket = self._plan, self._datablock, self._parts.buckets.landing_zone
        return Manifest(
            dataset_id=datablock.dataset_id,
            number=datablock.number,
            datablock_count=len(plan.datablocks),
            archive_id=archive_id(datablock.dataset_id, datablock.number),
            fingerprint=plan.fingerprint,
            target_bytes=self._target_bytes,
            size_bytes=datablock.size_bytes,
            payload_bytes=datablock.payload_bytes,
            digest=evidence.digest,
            members=tuple(
                _manifest_member(datablock.dataset_id, index, member, windows, checksums.get(member.path))
                for index, member in enumerate(datablock.members)
            ),
            evidence=(evidence,),
            created_at=now_iso(),
            software=f"mover {__version__}",
            source=f"s3://{bucket}/{raw_files_prefix(datablock.dataset_id)}",
        )

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


async def read_back_datablock(
    parts: Parts,
    folder: LtsFolder,
    datablock: Datablock | Manifest,
    windows: Mapping[WindowKey, str],
    checksums: Mapping[str, SourceChecksum],
) -> tuple[Evidence, ReadBackResult]:
    """Reads one datablock back from the storage. The caller holds a slot of VERIFY_LTS_LIMIT.

    Raises:
        LtsError: it cannot be read, or this host's page cache cannot be kept out of it.
        LayoutMismatchError: its size is another one.
    """
    name = datablock_name(datablock.dataset_id, datablock.number)
    announcer = parts.announcer(datablock.dataset_id, Stage.VERIFY, datablock.number, datablock.size_bytes)
    path = folder.datablock_path(name)
    reader = await open_when_online(path, datablock.size_bytes, policy=parts.recall, on_wait=announcer.waiting)
    position = 0

    def advance(done_bytes: int) -> None:
        nonlocal position
        position = done_bytes

    try:
        cache = await parts.on_lts(reader.drop_cache)
        if not cache:
            raise LtsError("verify", str(path), "this host's page cache cannot be kept out of the read-back")
        async with announcer.following(lambda: position):
            comparison = ReadBack(datablock, windows, checksums)
            result = await read_back(
                reader,
                comparison,
                datablock.size_bytes,
                parts.lanes.pool,
                stall_timeout_s=parts.stall_timeout_s,
                on_progress=advance,
            )
    finally:
        with anyio.CancelScope(shield=True):
            await parts.on_lts(reader.close)
    level = EvidenceLevel.RECALLED if reader.was_offline else EvidenceLevel.READ_BACK
    return Evidence(level, now_iso(), socket.gethostname(), labelled(result.digest), cache), result


def _manifest_member(
    dataset_id: str,
    index: int,
    member: Member,
    windows: Mapping[WindowKey, str],
    checksum: SourceChecksum | None,
) -> ManifestMember:
    return ManifestMember(
        path=member.path,
        key=raw_object_key(dataset_id, member.path),
        etag=member.etag,
        size_bytes=member.size_bytes,
        mtime_s=member.mtime_s,
        offset_bytes=member.offset_bytes,
        header_bytes=member.header_bytes,
        windows=tuple(windows[index, window] for window in range(window_count(member.size_bytes))),
        checksum=checksum,
    )


def _window_total(datablock: Datablock) -> int:
    return sum(window_count(member.size_bytes) for member in datablock.members)
