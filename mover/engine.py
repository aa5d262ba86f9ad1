"""The long-running engine: owns stores, limits, space gate and journal; any number of calls may run in it at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from mover.archive import ArchiveOptions, archive_dataset, plan_source
from mover.catalogue import Catalogue, NoCatalogue
from mover.errors import LtsError
from mover.journal import Journal
from mover.listing import list_archived, list_members
from mover.model import DatasetPlan, ManifestMember, Progress
from mover.parts import Buckets, Parts, hold_dataset
from mover.policies.limits import Limits, LimitStatistics
from mover.policies.recall import RecallPolicy
from mover.policies.retry import RetryPolicy
from mover.policies.space import SpaceGate, SpaceReading, SpaceStatistics
from mover.repair import repair_datablock
from mover.reports import ArchiveReport, DatablockReport, DatasetListing, RetrieveReport, Tally, VerifyReport
from mover.retrieve import RetrieveOptions, retrieve_dataset
from mover.stages import StageRunner, run_directly
from mover.streams.abandon import run_abandonable
from mover.streams.lts_mount import MountProfile, free_space, probe_mount
from mover.streams.memory import BufferPool, PoolStatistics
from mover.streams.pipe import Lanes
from mover.streams.s3 import S3Statistics, S3Store
from mover.streams.s3_calls import S3Endpoint
from mover.streams.s3_read import ReaderStatistics, S3Reader
from mover.verification import VerifyLevel, verify_dataset

__all__ = ["Engine", "EngineConfig", "EngineStatistics"]

T = TypeVar("T")

_SPACE_READING_TIMEOUT_S = 60.0


class EngineConfig(msgspec.Struct, frozen=True):
    """Everything an engine is built from; sizes in bytes. The faces make it from the settings."""

    s3: S3Endpoint
    buckets: Buckets
    lts_root: Path
    scratch_folder: Path
    lts_filesystem: str = ""  # type that the LTS has to have; '': any
    target_bytes: int = 200 << 20
    free_space_percentage: float = 20.0
    lts_file_timeout_s: float = 300.0
    wait_before_verify_s: float = 0.0
    space_deadline_s: float = 86_400.0
    staging: bool = False
    lts_free_limit: int = 1
    move_to_lts_limit: int = 2
    verify_lts_limit: int = 1
    lts_to_retrieval_limit: int = 1
    buffer_bytes: int = 256 << 20
    s3_concurrency: int = 64
    streams: int = 4  # windows of large objects that are received side by side; more cost more than they bring
    url_expiration_days: int = 7
    retry: RetryPolicy = RetryPolicy()


class EngineStatistics(msgspec.Struct, frozen=True):
    """State of an engine: limits, space, memory, requests, what was done, and repeated calls by retry class."""

    limits: tuple[LimitStatistics, ...]
    space: SpaceStatistics
    buffers: PoolStatistics
    reader: ReaderStatistics
    store: S3Statistics
    tally: Tally
    retries: dict[str, int]


class Engine:
    """Open it with :meth:`open`; belongs to one event loop. A cancelled call leaves what the next one resumes."""

    def __init__(self, parts: Parts, reader: S3Reader) -> None:
        self._parts, self._reader = parts, reader

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        config: EngineConfig,
        *,
        catalogue: Catalogue | None = None,
        tell: Callable[[Progress], None] = lambda _: None,
        run_stage: StageRunner = run_directly,
    ) -> AsyncIterator[Engine]:
        """An engine with its stores; the LTS is probed once.

        ``tell`` is called on the event loop for every progress event and must return at once. ``run_stage`` runs the
        stages of every datablock.

        Raises:
            MissingMountError: the LTS root is not there, or not on the type of file system that it has to have.
            LtsError: it cannot be probed, or does not answer.
        """
        profile = await _answered("probe", config.lts_root, lambda: _probe(config), config.lts_file_timeout_s)
        async with (
            S3Store.open(config.s3, policy=config.retry) as store,
            S3Reader.open(config.s3, threads=config.streams) as reader,
        ):
            yield cls(_build(config, store, reader, profile, catalogue or NoCatalogue(), tell, run_stage), reader)

    async def plan(self, dataset_id: str) -> DatasetPlan:
        """What archiving would write. Raises UserError."""
        return await plan_source(self._parts, dataset_id)

    @property
    def floor_percentage(self) -> float:
        """Share of the LTS that stays free."""
        return self._parts.space.floor_percentage

    @property
    def has_catalogue(self) -> bool:
        """Whether datablocks are registered anywhere."""
        return not isinstance(self._parts.catalogue, NoCatalogue)

    async def space(self) -> SpaceReading:
        """Size of the LTS and what is free there. Raises MissingMountError."""
        return await _space_reading(self._parts.lts_root, self._parts.profile)

    async def archive(self, dataset_id: str, *, release_source: bool = False) -> ArchiveReport:
        """Archives one dataset. Raises as ``archive_dataset``."""
        return await archive_dataset(self._parts, dataset_id, ArchiveOptions(release_source=release_source))

    async def verify(self, dataset_id: str, *, level: VerifyLevel = "read-back") -> VerifyReport:
        """Compares the datablocks with their manifests. Raises as ``verify_dataset``."""
        return await verify_dataset(self._parts, dataset_id, level)

    async def retrieve(
        self, dataset_id: str, *, files: Sequence[str] = (), form: Literal["datablocks", "files"] = "datablocks"
    ) -> RetrieveReport:
        """Brings a dataset, or single files of it, back to the retrieval bucket. Raises as ``retrieve_dataset``."""
        return await retrieve_dataset(self._parts, dataset_id, RetrieveOptions(files=tuple(files), form=form))

    async def repair(self, dataset_id: str, number: int) -> DatablockReport:
        """Rebuilds one datablock from its source or from its retrieval copy. Raises as ``repair_datablock``."""
        return await repair_datablock(self._parts, dataset_id, number)

    @asynccontextmanager
    async def holding(self, dataset_id: str) -> AsyncIterator[None]:
        """Keeps every run off a dataset.  Raises DatasetBusyError when one is at it."""
        async with hold_dataset(self._parts, dataset_id):
            yield

    def datasets(self, dataset_id: str | None = None) -> AsyncIterator[DatasetListing]:
        """All datasets that have manifests on the LTS, or the one that is named.  Raises DatasetNotFoundError."""
        return list_archived(self._parts, dataset_id)

    def members(self, dataset_id: str) -> AsyncIterator[tuple[int, ManifestMember]]:
        """(number of the datablock, member) of every file of a dataset.  Raises DatasetNotFoundError."""
        return list_members(self._parts, dataset_id)

    def limits(self) -> tuple[LimitStatistics, ...]:
        """The four limits now, in the order of the documentation."""
        return self._parts.limits.statistics()

    def set_limits(self, slots: Mapping[str, int]) -> tuple[LimitStatistics, ...]:
        """Changes limits by name from now on; lowering lets running work finish. Returns all of them.

        Raises:
            ConfigError: there is no such limit, or the number is below 1; nothing is changed then.
        """
        self._parts.limits.resize(slots)
        return self.limits()

    def statistics(self) -> EngineStatistics:
        """State of the engine now."""
        parts = self._parts
        store = parts.store.statistics()
        return EngineStatistics(
            parts.limits.statistics(),
            parts.space.statistics(),
            parts.lanes.pool.statistics(),
            self._reader.statistics(),
            store,
            parts.tally,
            dict(parts.lanes.retries + Counter(store.retries)),
        )


def _probe(config: EngineConfig) -> MountProfile:
    """What the mount can do; nothing is written to another one than the LTS. Blocking."""
    free_space(config.lts_root, config.lts_filesystem)
    return probe_mount(config.lts_root)


def _build(
    config: EngineConfig,
    store: S3Store,
    reader: S3Reader,
    profile: MountProfile,
    catalogue: Catalogue,
    tell: Callable[[Progress], None],
    run_stage: StageRunner,
) -> Parts:
    pool = BufferPool(config.buffer_bytes)

    async def reading() -> SpaceReading:
        return await _space_reading(config.lts_root, profile)

    return Parts(
        store=store,
        lanes=Lanes(reader, pool, requests=config.s3_concurrency, streams=config.streams, retry=config.retry),
        limits=Limits(
            lts_free=config.lts_free_limit,
            move_to_lts=config.move_to_lts_limit,
            verify_lts=config.verify_lts_limit,
            lts_to_retrieval=config.lts_to_retrieval_limit,
        ),
        space=SpaceGate(reading, config.free_space_percentage, deadline_s=config.space_deadline_s),
        journal=Journal(config.scratch_folder),
        catalogue=catalogue,
        lts_root=config.lts_root,
        profile=profile,
        buckets=config.buckets,
        recall=RecallPolicy(timeout_s=config.lts_file_timeout_s),
        tell=tell,
        run_stage=run_stage,
        target_bytes=config.target_bytes,
        staging=config.staging,
        wait_before_verify_s=config.wait_before_verify_s,
        stall_timeout_s=config.s3.stall_timeout_s,
        url_expiration_days=config.url_expiration_days,
    )


async def _space_reading(lts_root: Path, profile: MountProfile) -> SpaceReading:
    """A reading that gives up on a mount that hangs.  Raises LtsError."""
    return await _answered("stat", lts_root, lambda: free_space(lts_root, profile.filesystem), _SPACE_READING_TIMEOUT_S)


async def _answered(op: str, lts_root: Path, call: Callable[[], T], timeout_s: float) -> T:
    """What a call to the mount gives.  Raises LtsError for one that hangs."""
    try:
        return await run_abandonable(call, timeout_s)
    except TimeoutError as exc:
        raise LtsError(op, str(lts_root), f"no answer for {timeout_s:g} s") from exc
