"""The way back: find manifest → recall → stream the LTS → hash → retrieval bucket → compare → announce."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Literal, TypeVar

import anyio
import anyio.to_thread
import msgspec

from mover.download_script import download_script
from mover.errors import DatasetNotFoundError, IncompleteDatasetError, ObjectMissingError, UnknownFileError
from mover.model import Manifest, Stage, dataset_folder, raw_files_prefix
from mover.parts import Parts, decode_manifest
from mover.policies.names import check_dataset_id
from mover.policies.parts import part_bytes, require_memory
from mover.reports import ByteCounters, RetrievedObject, RetrieveReport
from mover.retrieve_copy import (
    DIGEST_KEY,
    SHA256_KEY,
    DatablockCheck,
    MemberCheck,
    Selection,
    Target,
    copy_pieces,
    datablock_target,
    member_targets,
    read_sidecar,
    sidecar,
)
from mover.streams.interfaces import ByteRange
from mover.streams.lts import LtsFolder
from mover.streams.lts_read import LtsReader, open_when_online
from mover.streams.upload import ObjectUpload, UploadPass
from mover.tasks import side_by_side

__all__ = ["RetrieveOptions", "retrieve_dataset"]

T = TypeVar("T")

_LOOKUPS = 16
_LIST_FROM = 1000  # for so many objects one listing is cheaper than asking for each
_SIDECAR_LIMIT_BYTES = 4096
_DAY_S = 86_400


class RetrieveOptions(msgspec.Struct, frozen=True):
    """What comes back, and how.

    ``files``: paths of members, or of folders with all that is below; empty: everything. Single files always come as
    one object each. ``form``: whole datablocks, or each member as an object of its own.
    """

    files: tuple[str, ...] = ()
    form: Literal["datablocks", "files"] = "datablocks"


class _Job(msgspec.Struct, frozen=True):
    """What is wanted of one datablock; ``wanted`` None: all of it."""

    name: str
    wanted: frozenset[str] | None


async def retrieve_dataset(parts: Parts, dataset_id: str, options: RetrieveOptions) -> RetrieveReport:
    """Brings a dataset, or files of it, to the retrieval bucket. What is there already is not read again.

    Raises:
        DatasetNotFoundError: nothing is archived under this name.
        IncompleteDatasetError: some datablocks have no manifest.
        UnknownFileError: a path is no file or folder of the dataset; nothing was read then.
        DigestMismatchError, LayoutMismatchError: the LTS no longer has the archived bytes; that object does not appear.
        MoverError: reading or writing failed; objects that were finished stay.
    """
    began = anyio.current_time()
    check_dataset_id(dataset_id)
    run = _Retrieval(parts, dataset_id, options)
    objects = await run.run()
    form: Literal["datablocks", "files"] = "files" if run.as_files else "datablocks"
    return RetrieveReport(
        dataset_id=dataset_id,
        form=form,
        objects=objects,
        counters=run.counters,
        elapsed_s=anyio.current_time() - began,
        expires_at=run.expires_at,
        script=await anyio.to_thread.run_sync(download_script, dataset_id, objects, form, run.expires_at),
    )


class _Retrieval:
    """One call. Manifests are read one at a time: a dataset of a million files has more than memory should hold."""

    def __init__(self, parts: Parts, dataset_id: str, options: RetrieveOptions) -> None:
        self._parts, self._dataset_id, self._options = parts, dataset_id, options
        self._folder: LtsFolder = parts.folder(dataset_id)
        self._bucket = parts.buckets.retrieval
        self._listed: set[str] | None = None  # keys that are there; None: ask for each
        self.as_files = options.form == "files" or bool(options.files)
        self.counters = ByteCounters()
        self.expires_at = ""

    async def run(self) -> tuple[RetrievedObject, ...]:
        """The objects, in the order of the datablocks and of the members in them."""
        jobs = await self._jobs()
        if self.as_files:
            await self._list_present(jobs)
        results: dict[str, list[tuple[Target, str, bool]]] = {}

        async def retrieve(job: _Job) -> None:
            results[job.name] = await self._datablock(job)

        # one more than the limit has slots, so that the next datablock is ready when one comes free
        limits = self._parts.limits
        await side_by_side(
            jobs, retrieve, lambda: limits.lts_to_retrieval.statistics().slots + 1, lambda: limits.changed
        )
        lifetime = timedelta(days=self._parts.url_expiration_days)
        self.expires_at = (datetime.now(UTC) + lifetime).isoformat(timespec="seconds").replace("+00:00", "Z")
        return tuple([await self._announce(*result) for job in jobs for result in results[job.name]])

    async def _jobs(self) -> list[_Job]:
        """What to do, after every name that was asked for has been found."""
        names = await self._parts.on_lts(self._folder.manifest_names)
        if not names:
            where = f"{self._parts.lts_root}/{dataset_folder(self._dataset_id)}"
            raise DatasetNotFoundError(self._dataset_id, where)
        await self._require_complete(names)
        if not self._options.files:
            return [_Job(name, None) for name in names]
        selection = Selection(self._options.files)
        jobs = []
        for name in names:
            manifest = await self._manifest(name)
            wanted = await anyio.to_thread.run_sync(selection.among, manifest)
            if wanted:
                jobs.append(_Job(name, wanted))
        if selection.unknown:
            raise UnknownFileError(self._dataset_id, selection.unknown)
        return jobs

    async def _require_complete(self, names: Sequence[str]) -> None:
        count = (await self._manifest(names[0])).datablock_count
        present = {int(name.rpartition("_")[2].removesuffix(".tar")) for name in names}
        missing = [number for number in range(1, count + 1) if number not in present]
        if missing:
            raise IncompleteDatasetError(self._dataset_id, missing, count)

    async def _manifest(self, name: str) -> Manifest:
        data = await self._parts.on_lts(self._folder.read_manifest, name)
        if data is None:
            raise DatasetNotFoundError(self._dataset_id, f"{name}, which was there a moment ago")
        return await anyio.to_thread.run_sync(decode_manifest, data, name, self._dataset_id)

    async def _list_present(self, jobs: Sequence[_Job]) -> None:
        if sum(len(job.wanted) if job.wanted is not None else _LIST_FROM for job in jobs) >= _LIST_FROM:
            prefix = raw_files_prefix(self._dataset_id)
            listing = self._parts.store.list_objects(self._bucket, prefix)
            self._listed = {prefix + item.path async for item in listing}

    async def _datablock(self, job: _Job) -> list[tuple[Target, str, bool]]:
        """Each object with its SHA-256 ('': unknown) and whether it was there already."""
        manifest = await self._manifest(job.name)
        targets = member_targets(manifest, job.wanted) if self.as_files else [datablock_target(manifest)]
        present: dict[str, str] = {}

        async def look_up(target: Target) -> None:
            sha256 = await self._look_up(target)
            if sha256 is not None:
                present[target.key] = sha256

        await side_by_side(targets, look_up, lambda: _LOOKUPS)
        missing = [target for target in targets if target.key not in present]
        written = await self._copy(manifest, job.name, missing) if missing else {}
        return [
            (target, present.get(target.key) or written.get(target.key, ""), target.key in present)
            for target in targets
        ]

    async def _look_up(self, target: Target) -> str | None:
        """SHA-256 ('' when not known) of the object that is there already; None when there is none like it."""
        if self._listed is not None and target.key not in self._listed:
            return None
        try:
            found, metadata = await self._parts.store.describe(self._bucket, target.key)
        except ObjectMissingError:
            return None
        if (found.size_bytes, metadata.get(DIGEST_KEY)) != (target.size_bytes, target.digest):
            return None
        if target.index is not None:
            return metadata.get(SHA256_KEY, "")
        return await self._read_sidecar(target)

    async def _read_sidecar(self, target: Target) -> str:
        key, lanes = sidecar(target.key), self._parts.lanes
        try:
            found = await self._parts.store.head(self._bucket, key)
            if found.size_bytes > _SIDECAR_LIMIT_BYTES:
                return ""
            whole = ByteRange(self._bucket, key, found.etag, found.size_bytes, 0, found.size_bytes)
            text = bytearray(found.size_bytes)
            await lanes.retrying(lambda: lanes.reader.fetch(whole, memoryview(text)))
            return read_sidecar(text)
        except ObjectMissingError:
            return ""

    async def _copy(self, manifest: Manifest, name: str, targets: Sequence[Target]) -> dict[str, str]:
        """Writes ``targets``; returns the SHA-256 of each by key."""
        parts = self._parts
        largest_bytes = max(target.size_bytes for target in targets)
        require_memory(min(part_bytes(largest_bytes), largest_bytes), parts.lanes.pool.limit_bytes)
        proved: dict[str, str] = {}

        async def copy() -> None:
            reader = await self._recall(manifest, name)
            try:
                await self._run_pass(manifest, reader, targets, proved)
            finally:
                with anyio.CancelScope(shield=True):
                    await parts.on_lts(reader.close)

        await parts.limited(parts.limits.lts_to_retrieval, Stage.RETRIEVE, name, copy)
        return proved

    def _upload(self, manifest: Manifest, target: Target, proved: dict[str, str]) -> ObjectUpload:
        async def write_sidecar() -> None:
            # before the object itself: whoever finds that one finds this, too
            text = f"{proved[target.key]}  {target.key.rpartition('/')[2]}\n"
            await self._parts.store.put(self._bucket, sidecar(target.key), text.encode(), {})

        on_proved = partial(proved.__setitem__, target.key)
        metadata = {DIGEST_KEY: target.digest}
        check: DatablockCheck | MemberCheck
        if target.index is None:
            check = DatablockCheck(manifest, on_proved)
            return ObjectUpload(self._bucket, target.key, target.size_bytes, check, metadata, write_sidecar)
        check = MemberCheck(manifest, manifest.members[target.index], on_proved)
        return ObjectUpload(self._bucket, target.key, target.size_bytes, check, metadata)

    async def _recall(self, manifest: Manifest, name: str) -> LtsReader:
        announcer = self._parts.announcer(self._dataset_id, Stage.RECALL, manifest.number)
        path = self._folder.datablock_path(name)
        with announcer.stage():
            return await open_when_online(
                path, manifest.size_bytes, policy=self._parts.recall, on_wait=announcer.waiting
            )

    async def _run_pass(
        self, manifest: Manifest, reader: LtsReader, targets: Sequence[Target], proved: dict[str, str]
    ) -> None:
        parts = self._parts

        async def read(offset_bytes: int, view: memoryview) -> None:
            await reader.read(offset_bytes, view, parts.stall_timeout_s)

        total_bytes = sum(target.size_bytes for target in targets)
        stage = parts.announcer(self._dataset_id, Stage.RETRIEVE, manifest.number, total_bytes)
        uploads = ((target, self._upload(manifest, target, proved)) for target in targets)
        copying = UploadPass(read, parts.store, parts.lanes)
        try:
            async with stage.following(lambda: copying.written_bytes):
                await copying.run(copy_pieces(manifest, uploads))
            self._parts.tally.add(Stage.RETRIEVE, len(targets))
        finally:
            self.counters.lts_read_bytes += copying.read_bytes
            self.counters.retrieval_written_bytes += copying.written_bytes

    async def _announce(self, target: Target, sha256: str, adopted: bool) -> RetrievedObject:  # noqa: FBT001 - a result
        return RetrievedObject(
            key=target.key,
            size_bytes=target.size_bytes,
            digest=target.digest,
            sha256=sha256,
            url=await self._parts.store.presign(self._bucket, target.key, self._parts.url_expiration_days * _DAY_S),
            outcome="adopted" if adopted else "written",
        )
