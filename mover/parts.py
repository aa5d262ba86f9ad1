"""What the pipelines share: stores, limits, journal, and a way to tell what happens. Built by the engine."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread
import msgspec

from mover.catalogue import Catalogue
from mover.errors import ManifestError, MoverError
from mover.journal import Journal
from mover.model import FORMAT_VERSION, Manifest, Progress, Stage
from mover.policies.limits import Limit, Limits
from mover.policies.recall import RecallPolicy
from mover.policies.space import SpaceGate
from mover.reports import Tally
from mover.stages import StageRunner
from mover.streams.lts import LtsFolder
from mover.streams.lts_lock import LEASE_REFRESH_S, DatasetLock
from mover.streams.lts_mount import MountProfile
from mover.streams.pipe import Lanes
from mover.streams.s3 import S3Store
from mover.tasks import open_task_group

__all__ = ["Announcer", "Buckets", "Parts", "decode_manifest", "hold_dataset", "now_iso", "read_manifests"]

T = TypeVar("T")

_PROGRESS_EVERY_S = 0.25


class Buckets(msgspec.Struct, frozen=True):
    """Names of the three buckets."""

    landing_zone: str
    staging: str
    retrieval: str


class Parts(msgspec.Struct, frozen=True):
    """The shared parts of one engine. ``lts_root`` and the numbers are the settings' values."""

    store: S3Store
    lanes: Lanes
    limits: Limits
    space: SpaceGate
    journal: Journal
    catalogue: Catalogue
    lts_root: Path
    profile: MountProfile
    buckets: Buckets
    recall: RecallPolicy
    tell: Callable[[Progress], None]
    run_stage: StageRunner
    target_bytes: int
    staging: bool
    wait_before_verify_s: float
    stall_timeout_s: float
    url_expiration_days: int
    tally: Tally = msgspec.field(default_factory=Tally)

    def folder(self, dataset_id: str) -> LtsFolder:
        """The LTS folder of a dataset; nothing is touched."""
        return LtsFolder(self.lts_root, dataset_id, self.profile)

    async def on_lts(self, call: Callable[..., T], *arguments: object) -> T:
        """The result of a blocking call on the LTS, made in a worker thread."""
        return await anyio.to_thread.run_sync(call, *arguments, limiter=self.lanes.disk)

    async def limited(self, limit: Limit, stage: Stage, name: str, work: Callable[[], Awaitable[T]]) -> T:
        """The result of a stage that needs one of the limit's slots."""
        async with limit.slot(name):
            return await self.run_stage(stage, name, work)

    def announcer(self, dataset_id: str, stage: Stage, datablock: int = 0, total_bytes: int = 0) -> Announcer:
        """Tells the progress of one stage."""
        return Announcer(self.tell, dataset_id, stage, datablock, total_bytes)


class Announcer:
    """Progress events of one stage of one datablock (0: of the dataset)."""

    def __init__(
        self, tell: Callable[[Progress], None], dataset_id: str, stage: Stage, datablock: int, total_bytes: int
    ) -> None:
        self._tell, self._dataset_id, self._stage, self._datablock = tell, dataset_id, stage, datablock
        self._total_bytes = total_bytes

    def expect(self, total_bytes: int) -> None:
        """The stage turns out to be about so many bytes."""
        self._total_bytes = total_bytes

    def started(self, done_bytes: int = 0) -> None:
        """The stage begins; ``done_bytes`` were done before."""
        done_bytes = min(done_bytes, self._total_bytes)
        self._tell(Progress(self._dataset_id, self._stage, "started", self._datablock, done_bytes, self._total_bytes))

    def waiting(self, reason: str, waited_s: float = 0.0) -> None:
        """The stage waits, and for what."""
        text = f"{reason} ({waited_s:.0f} s)" if waited_s >= 1 else reason
        self._tell(Progress(self._dataset_id, self._stage, "waiting", self._datablock, 0, self._total_bytes, text))

    def progress(self, done_bytes: int) -> None:
        """So many bytes are done."""
        done_bytes = min(done_bytes, self._total_bytes)
        self._tell(Progress(self._dataset_id, self._stage, "progress", self._datablock, done_bytes, self._total_bytes))

    @contextmanager
    def stage(self, done_bytes: int = 0) -> Iterator[None]:
        """Tells start, end and failure of the block; ``done_bytes`` were done before."""
        self.started(done_bytes)
        try:
            yield
        except MoverError as exc:
            self._tell(Progress(self._dataset_id, self._stage, "failed", self._datablock, reason=str(exc)))
            raise
        total = self._total_bytes
        self._tell(Progress(self._dataset_id, self._stage, "finished", self._datablock, total, total))

    @asynccontextmanager
    async def following(self, done_bytes: Callable[[], int]) -> AsyncIterator[None]:
        """As ``stage``, and tells ``done_bytes()`` a few times a second in between."""

        async def follow() -> None:
            while True:
                await anyio.sleep(_PROGRESS_EVERY_S)
                self.progress(done_bytes())

        with self.stage(done_bytes()):
            async with open_task_group() as tasks:
                tasks.start_soon(follow)
                yield
                tasks.cancel_scope.cancel()


@asynccontextmanager
async def hold_dataset(parts: Parts, dataset_id: str) -> AsyncIterator[LtsFolder]:
    """Keeps every other run off the dataset inside the block; the folder is made when missing.

    Raises:
        DatasetBusyError: another run holds it.
        LtsError: the mount fails, or the hold is lost: then the block is cancelled.
    """
    folder = await parts.on_lts(lambda: LtsFolder.open(parts.lts_root, dataset_id, parts.profile))
    holder = f"{socket.gethostname()}, process {os.getpid()}, since {now_iso()}"
    lock = await parts.on_lts(folder.lock, holder)
    try:
        async with open_task_group() as tasks:
            tasks.start_soon(_refresh, parts, lock)
            yield folder
            tasks.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await parts.on_lts(lock.release)


async def _refresh(parts: Parts, lock: DatasetLock) -> None:
    while True:
        await anyio.sleep(LEASE_REFRESH_S)
        await parts.on_lts(lock.refresh)


async def read_manifests(parts: Parts, folder: LtsFolder) -> list[Manifest]:
    """All manifests of a dataset, by number.  Raises ManifestError for one that cannot be used."""
    manifests = []
    for name in await parts.on_lts(folder.manifest_names):
        data = await parts.on_lts(folder.read_manifest, name)
        if data is not None:
            manifests.append(await anyio.to_thread.run_sync(decode_manifest, data, name, folder.dataset_id))
    return manifests


def decode_manifest(data: bytes, name: str, dataset_id: str) -> Manifest:
    """One manifest.

    Raises:
        ManifestError: it is damaged, of another dataset or of a version that is not known here.
    """
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as exc:
        raise ManifestError(name, str(exc)) from exc
    if manifest.version != FORMAT_VERSION:
        raise ManifestError(name, f"version {manifest.version}; this program knows {FORMAT_VERSION}")
    if manifest.dataset_id != dataset_id:
        raise ManifestError(name, f"it belongs to dataset {manifest.dataset_id!r}")
    return manifest


def now_iso() -> str:
    """Now, ISO 8601, UTC, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
