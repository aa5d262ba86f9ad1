"""The end of a job whose run is gone for good: no dataset is left looking as if somebody worked on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Protocol

from mover.catalogue import CatalogueJob, JobCatalogue
from mover.engine import Engine
from mover.errors import DatasetNotFoundError, MoverError
from mover.jobs import merged_datasets, tell, update_job
from mover.jobs_lifecycle import (
    DatasetOutcome,
    JobKind,
    OutcomeState,
    failure_outcome,
    is_archived,
    is_started,
    job_verdict,
    told_failure,
)
from mover.jobs_result import archived_outcome
from mover.reports import ArchiveReport, DatasetListing

__all__ = ["OpenEngine", "SettlingEngine", "settle_dataset", "settle_job", "this_engine"]


class SettlingEngine(Protocol):
    """What it takes of an engine to settle datasets: this process's, or one that is elsewhere."""

    def datasets(self, dataset_id: str | None = None) -> AsyncIterator[DatasetListing]:
        """See ``Engine.datasets``."""
        ...

    async def archive(self, dataset_id: str) -> ArchiveReport:
        """See ``Engine.archive``."""
        ...

    def holding(self, dataset_id: str) -> AbstractAsyncContextManager[None]:
        """See ``Engine.holding``."""
        ...


OpenEngine = Callable[[], AbstractAsyncContextManager[SettlingEngine]]
"""Opens an engine, or gives one that is open: asked only where one is needed, as the LTS may be what is away."""


def this_engine(engine: Engine) -> OpenEngine:
    """An engine that is open already."""
    return lambda: nullcontext(engine)


async def settle_job(
    open_engine: OpenEngine,
    catalogue: JobCatalogue,
    job: CatalogueJob,
    kind: JobKind,
    state: OutcomeState,
    message: str,
) -> str:
    """Ends the job; returns its status code.

    Datasets that are archived stay so, and one that lacked only its registration is finished. Those that nobody began
    are left as they are.

    Raises:
        DatasetBusyError: another run holds a dataset, or a dead one's lease has not run out; it has to be tried again.
        MoverError: the catalogue or the LTS is away; the same.
    """
    outcomes = [
        await settle_dataset(open_engine, catalogue, kind, DatasetOutcome(dataset_id, state, message))
        for dataset_id in merged_datasets(job)
    ]
    code, text = job_verdict(kind, outcomes)
    await update_job(catalogue, job.job_id, code, text)
    return code


async def settle_dataset(
    open_engine: OpenEngine, catalogue: JobCatalogue, kind: JobKind, outcome: DatasetOutcome
) -> DatasetOutcome:
    """Shows the outcome with a dataset that looks as if somebody worked on it; returns what is true of it.

    What cannot be settled as meant, and never will be, is the facility's or the owner's error, and shown as that.
    Raises as ``settle_job``.
    """
    try:
        return await _settle(open_engine, catalogue, kind, outcome)
    except MoverError as error:
        if error.retryable:
            raise
        failed = failure_outcome(outcome.dataset_id, error)
        return await tell(catalogue, kind, failed) if await _still_started(catalogue, kind, failed) else failed


async def _settle(
    open_engine: OpenEngine, catalogue: JobCatalogue, kind: JobKind, outcome: DatasetOutcome
) -> DatasetOutcome:
    now = await catalogue.lifecycle(outcome.dataset_id)
    if kind == "archive" and is_archived(now):
        return DatasetOutcome(outcome.dataset_id, "done", "")
    if not is_started(kind, now):
        return told_failure(outcome.dataset_id, now) or outcome
    if kind == "retrieve":
        return await tell(catalogue, kind, outcome)
    async with open_engine() as engine:
        if await _is_whole(engine, outcome.dataset_id):
            report = await engine.archive(outcome.dataset_id)  # its source may be gone already: never taken back
            return await tell(catalogue, kind, archived_outcome(report))
        async with engine.holding(outcome.dataset_id):
            await catalogue.unregister_all(outcome.dataset_id)  # all of its datablocks or none
            return await tell(catalogue, kind, outcome)


async def _is_whole(engine: SettlingEngine, dataset_id: str) -> bool:
    """Whether all datablocks are committed on the LTS."""
    try:
        return all([listing.datablocks == listing.datablock_count async for listing in engine.datasets(dataset_id)])
    except DatasetNotFoundError:
        return False


async def _still_started(catalogue: JobCatalogue, kind: JobKind, outcome: DatasetOutcome) -> bool:
    try:
        return is_started(kind, await catalogue.lifecycle(outcome.dataset_id))
    except MoverError as error:
        if error.retryable:
            raise
        return False  # the catalogue does not know it any more, or lets nobody look
