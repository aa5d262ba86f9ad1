"""The detour over the staging bucket: a datablock is put together there as one object, and read from there to the LTS.

The object is the tar file byte for byte. It is uploaded in parts of whole units, so that each window is in one part; a
part's buffer is filled by the very units that would be written to the LTS.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import anyio
import anyio.to_thread
import msgspec

from mover.cleanup import empty_staging_copy
from mover.errors import ObjectMissingError, UploadMissingError
from mover.journal import DatablockJournal, JournalState, StagedPart
from mover.model import Datablock, DatasetPlan, Manifest, ManifestMember, Member, Stage, archive_id, window_count
from mover.parts import Parts
from mover.policies.parts import part_bytes, require_memory
from mover.reports import ByteCounters
from mover.streams.interfaces import Buffer, ByteRange, MultipartUpload
from mover.streams.memory import BufferPool
from mover.streams.pipe import STREAM_BUFFER_BYTES, Locate, MoveCounters, UnitMover, WindowDigest
from mover.streams.units import BATCH_BYTES, Batch, Slice, WindowKey, cut
from mover.tasks import let_finish, open_task_group

__all__ = ["empty_staging", "from_datablock_object", "stage_datablock"]

_FINGERPRINT = "mover-fingerprint"
_SCRATCH_BYTES = max(BATCH_BYTES, STREAM_BUFFER_BYTES)  # what a part's units need besides, one after another
_PARTS_IN_FLIGHT = 6  # as far as the memory allows
_LAST_REQUEST_S = 20.0  # what a cancelled stage may take to know the upload that it has begun


async def stage_datablock(
    parts: Parts,
    plan: DatasetPlan,
    datablock: Datablock,
    journal: DatablockJournal,
    landing_zone: Locate,
    counters: ByteCounters,
) -> tuple[Locate, Mapping[WindowKey, str]]:
    """Puts the datablock together in the staging bucket, or finishes what an earlier run began there.

    Returns where its members' bytes are in the staging object, and every window's digest as received from the landing
    zone. An object that is there already counts when it is this plan's and the journal has all of those digests.

    Raises:
        ConfigError: the parts of so large a datablock do not fit into MOVER_BUFFER_MB.
        MoverError: reading or writing failed; the parts that arrived stay, for the next run.
    """
    run = _Staging(parts, plan, datablock, journal, landing_zone, counters)
    etag = await run.run()
    key = archive_id(datablock.dataset_id, datablock.number)
    locate = from_datablock_object(parts.buckets.staging, key, etag, datablock.size_bytes)
    return locate, dict(journal.state.staged_windows)


async def empty_staging(parts: Parts, manifest: Manifest) -> None:
    """Deletes the staging copy of a datablock that was read back.  Raises ManifestError when it was not."""
    await empty_staging_copy(parts.store, parts.buckets.staging, manifest)


def from_datablock_object(bucket: str, key: str, etag: str, object_bytes: int) -> Locate:
    """Bytes of members come from one object that is the whole datablock."""

    def locate(member: Member | ManifestMember, start: int, end: int) -> ByteRange:
        offset_bytes = member.payload_offset_bytes
        return ByteRange(bucket, key, etag, object_bytes, offset_bytes + start, offset_bytes + end)

    return locate


class _Part(msgspec.Struct, frozen=True):
    """Units in a row that make one part of the object."""

    number: int
    offset_bytes: int
    size_bytes: int
    units: tuple[Batch | Slice, ...]

    @property
    def memory_bytes(self) -> int:
        """The part itself, and the bodies that wait to be copied into it."""
        return self.size_bytes + _SCRATCH_BYTES


class _PartSink:
    """Takes the bytes of a datablock that belong to one part, into memory."""

    def __init__(self, view: memoryview, offset_bytes: int) -> None:
        self._view, self._offset_bytes = view, offset_bytes

    def write_at(self, offset_bytes: int, buffers: Sequence[Buffer], /) -> None:
        position = offset_bytes - self._offset_bytes
        for buffer in buffers:
            end = position + len(buffer)
            self._view[position:end] = buffer
            position = end


def _in_parts(datablock: Datablock) -> Iterator[_Part]:
    """The same parts for the same datablock, whatever the memory: what is uploaded stays usable."""
    least_bytes = part_bytes(datablock.size_bytes)
    number, offset_bytes, size_bytes = 1, 0, 0
    units: list[Batch | Slice] = []
    for unit in cut(datablock):
        units.append(unit)
        size_bytes += unit.size_bytes
        if size_bytes >= least_bytes:
            yield _Part(number, offset_bytes, size_bytes, tuple(units))
            number, offset_bytes, size_bytes, units = number + 1, offset_bytes + size_bytes, 0, []
    if units:
        yield _Part(number, offset_bytes, size_bytes, tuple(units))


class _Staging:
    """One datablock's way to the staging bucket."""

    def __init__(
        self,
        parts: Parts,
        plan: DatasetPlan,
        datablock: Datablock,
        journal: DatablockJournal,
        landing_zone: Locate,
        counters: ByteCounters,
    ) -> None:
        self._parts, self._plan, self._datablock, self._journal = parts, plan, datablock, journal
        self._landing_zone, self._counters = landing_zone, counters
        self._key = archive_id(datablock.dataset_id, datablock.number)
        self._received = MoveCounters()
        self._done_bytes = 0

    async def run(self) -> str:
        """Returns the ETag of the object."""
        parts, datablock = self._parts, self._datablock
        await self._begin_journal()
        etag = await self._finished_before()
        if etag is not None:
            return etag
        largest = await anyio.to_thread.run_sync(lambda: max(part.memory_bytes for part in _in_parts(datablock)))
        require_memory(largest, parts.lanes.pool.limit_bytes)
        stage = parts.announcer(datablock.dataset_id, Stage.STAGE, datablock.number, datablock.size_bytes)
        try:
            async with stage.following(lambda: self._done_bytes):
                return await self._upload()
        finally:
            self._counters.landing_zone_read_bytes += self._received.received_bytes

    async def _begin_journal(self) -> None:
        """Makes the journal one of this plan; what another plan left in the bucket is dropped."""
        state, store = self._journal.state, self._parts.store
        if state.describes(self._plan.fingerprint, self._datablock.size_bytes):
            return
        if state.upload_id:
            await store.abort(self._as_upload(state.upload_id))
        begin = self._journal.begin
        await self._parts.on_lts(begin, self._plan.fingerprint, self._datablock.size_bytes, 0)

    async def _finished_before(self) -> str | None:
        datablock = self._datablock
        if not self._knows_every_window(self._journal.state):
            return None
        try:
            found, metadata = await self._parts.store.describe(self._parts.buckets.staging, self._key)
        except ObjectMissingError:
            return None
        same = found.size_bytes == datablock.size_bytes and metadata.get(_FINGERPRINT) == self._plan.fingerprint
        return found.etag if same else None

    def _knows_every_window(self, state: JournalState) -> bool:
        # the keys come from this plan's units alone, so their number decides
        return len(state.staged_windows) == sum(window_count(member.size_bytes) for member in self._datablock.members)

    async def _upload(self) -> str:
        upload, etags = await self._open_upload()
        pending = _in_parts(self._datablock)

        async def work() -> None:
            for part in pending:  # shared: each worker takes the next one
                if part.number in etags:
                    self._done_bytes += part.size_bytes
                else:
                    etags[part.number] = await self._move_part(upload, part)

        async with open_task_group() as tasks:
            for _ in range(_PARTS_IN_FLIGHT):
                tasks.start_soon(work)
        return await self._parts.store.complete(upload, [etags[number] for number in sorted(etags)])

    async def _open_upload(self) -> tuple[MultipartUpload, dict[int, str]]:
        """The upload, and the ETags of the parts in it that the journal knows, too."""
        state, store = self._journal.state, self._parts.store
        if state.upload_id:
            upload = self._as_upload(state.upload_id)
            try:
                there = await store.list_parts(upload)
            except UploadMissingError:
                pass
            else:
                return upload, {
                    number: part.etag
                    for number, part in state.parts.items()
                    if number in there and there[number][0] == part.etag
                }
        begun: list[MultipartUpload] = []

        async def begin() -> None:
            upload = await store.begin(self._parts.buckets.staging, self._key, {_FINGERPRINT: self._plan.fingerprint})
            await self._parts.on_lts(self._journal.begin_staging, upload.upload_id)
            begun.append(upload)

        await let_finish(begin, _LAST_REQUEST_S)  # cut off, it could leave an upload that no journal knows
        while not begun:
            await anyio.sleep_forever()  # raises: it was cancelled
        return begun[0], {}

    async def _move_part(self, upload: MultipartUpload, part: _Part) -> str:
        lanes = self._parts.lanes
        windows: list[WindowDigest] = []
        # one lease for all that the part needs: whoever holds memory never waits for more
        async with lanes.pool.lease(part.memory_bytes) as leased:
            view = leased[: part.size_bytes]
            sink, scratch = _PartSink(view, part.offset_bytes), BufferPool(_SCRATCH_BYTES)
            mover = UnitMover(sink, lanes, scratch, self._landing_zone, self._received)
            for unit in part.units:
                windows += await mover.move(unit)
            etag = await self._parts.store.put_part(upload, part.number, view)
        self._counters.staging_written_bytes += part.size_bytes
        self._done_bytes += part.size_bytes
        await self._parts.on_lts(self._journal.add_part, StagedPart(part.number, etag), windows)
        return etag

    def _as_upload(self, upload_id: str) -> MultipartUpload:
        return MultipartUpload(self._parts.buckets.staging, self._key, upload_id)
