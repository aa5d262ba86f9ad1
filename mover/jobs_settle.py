"""The end of a job whose run is gone for good: no dataset is left looking as if somebody worked on it."""

from __future__ import annotations

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

__all__ = ["settle_job"]


async def settle_job(
    engine: Engine, catalogue: JobCatalogue, job: CatalogueJob, kind: JobKind, state: OutcomeState, message: str
) -> str:
    """Ends the job; returns its status code.

    Datasets that are archived stay so, and one that lacked only its registration is finished. Those that nobody began
    are left as they are.

    Raises:
        DatasetBusyError: another run holds a dataset, or a dead one's lease has not run out; it has to be tried again.
        MoverError: the catalogue or the LTS is away; the same.
    """
    outcomes = []
    for dataset_id in merged_datasets(job):
        outcome = DatasetOutcome(dataset_id, state, message)
        try:
            outcomes.append(await _settle(engine, catalogue, kind, outcome))
        except MoverError as error:
            if error.retryable:
                raise
            outcomes.append(failure_outcome(dataset_id, error))
    code, text = job_verdict(kind, outcomes)
    await update_job(catalogue, job.job_id, code, text)
    return code


async def _settle(engine: Engine, catalogue: JobCatalogue, kind: JobKind, outcome: DatasetOutcome) -> DatasetOutcome:
    now = await catalogue.lifecycle(outcome.dataset_id)
    if kind == "archive" and is_archived(now):
        return DatasetOutcome(outcome.dataset_id, "done", "")
    if not is_started(kind, now):
        return told_failure(outcome.dataset_id, now) or outcome
    if kind == "retrieve":
        return await tell(catalogue, kind, outcome)
    if await _is_whole(engine, outcome.dataset_id):
        report = await engine.archive(outcome.dataset_id)  # its source may be gone already: never taken back
        return await tell(catalogue, kind, archived_outcome(report))
    async with engine.holding(outcome.dataset_id):
        await catalogue.unregister_all(outcome.dataset_id)  # all of its datablocks or none
        return await tell(catalogue, kind, outcome)


async def _is_whole(engine: Engine, dataset_id: str) -> bool:
    """Whether all datablocks are committed on the LTS."""
    try:
        return all([listing.datablocks == listing.datablock_count async for listing in engine.datasets(dataset_id)])
    except DatasetNotFoundError:
        return False
