"""A job of the catalogue as a flow run: every dataset a run of its own, several at a time, one verdict at the end."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.progress import run_logger
from flows.services import Services
from mover.catalogue import JobDataset
from mover.errors import JobFinishedError, MoverError, gravity
from mover.jobs import DatasetResult
from mover.jobs_lifecycle import (
    FINISHED_WITH_DATASET_ERRORS,
    SUCCESSFUL,
    DatasetOutcome,
    JobKind,
    job_verdict,
)
from mover.jobs_result import job_result
from mover.reports import ArchiveReport, RetrieveReport
from mover.tasks import open_task_group

__all__ = ["dataset_result", "dry_run_state", "outcome_state", "run_job"]

R = TypeVar("R", ArchiveReport, RetrieveReport)

_DATASETS_AT_A_TIME: Final = 4  # small datasets side by side keep all slots of the limits busy
_STATES: Final = {SUCCESSFUL: "Completed", FINISHED_WITH_DATASET_ERRORS: "CompletedWithDatasetErrors"}


def outcome_state(outcome: DatasetOutcome) -> State[Any]:
    """The Prefect state of one dataset's run."""
    if outcome.state == "done":
        return Completed(message=outcome.message)
    return Failed(name="UserError" if outcome.state == "user-error" else None, message=outcome.message)


def dry_run_state(told: Sequence[str], failures: Sequence[str]) -> State[Any]:
    """The state of a job's run that only looked: what it saw of each dataset, and what cannot work."""
    if failures:
        return Failed(message="; ".join([f"{len(failures)} dataset(s) would fail", *failures, *told]))
    return Completed(message="; ".join([*told, "nothing written"]))


async def dataset_result(
    results: Mapping[str, DatasetResult[R]], dataset_id: str, state: State[Any]
) -> DatasetResult[R]:
    """What the run of one dataset came to.  Raises what the run raised."""
    if dataset_id not in results:
        await state.aresult(raise_on_failure=True)
    return results[dataset_id]


async def run_job(
    services: Services,
    kind: JobKind,
    job_id: str,
    dataset_ids: Sequence[str] | None,
    run: Callable[[JobDataset], Awaitable[DatasetResult[R]]],
    *,
    again: bool = False,
) -> State[Any]:
    """Runs all datasets of a job and ends it in the catalogue; returns the run's state.

    A job that has ended already is left alone, unless ``again``. A run for some of its datasets tells how they go and
    leaves the job as it is.

    Raises:
        JobNotFoundError, JobMismatchError: there is no such job, or it is another one than was meant.
        MoverError: the catalogue could not be told; the job stays in progress, for the next run.
    """
    try:
        datasets = await services.jobs.read(job_id, kind, dataset_ids, again=again)
    except JobFinishedError as error:
        return Completed(name="Skipped", message=str(error))
    if kind == "archive" and any(dataset.files for dataset in datasets):
        run_logger().warning("the job names single files; datasets are archived whole")
    if dataset_ids is None:
        await services.jobs.begin(job_id, f"{len(datasets)} dataset(s) to {kind}")
    results = await _each(datasets, run)
    outcomes = [result.outcome for result in results]
    code, message = job_verdict(kind, outcomes)
    if dataset_ids is None:
        result = job_result(outcomes, _retrievals(results))
        code = await services.jobs.finish(job_id, kind, outcomes, result, again=again)
    run_logger().info("job %s: %s, %s", job_id, code, message)
    name = _STATES.get(code)
    return Failed(message=message) if name is None else Completed(name=name, message=message)


def _retrievals(results: Sequence[DatasetResult[Any]]) -> list[RetrieveReport]:
    return [result.report for result in results if isinstance(result.report, RetrieveReport)]


async def _each(
    datasets: Sequence[JobDataset], run: Callable[[JobDataset], Awaitable[DatasetResult[R]]]
) -> list[DatasetResult[R]]:
    """All results in the order of the job. A dataset whose catalogue could not be told does not stop its siblings."""
    results: dict[str, DatasetResult[R]] = {}
    errors: list[Exception] = []
    pending = iter(datasets)

    async def work() -> None:
        for dataset in pending:  # shared: each task takes the next one
            try:
                results[dataset.dataset_id] = await run(dataset)
            except Exception as error:  # noqa: BLE001 - raised below, after the siblings are done
                errors.append(error)

    async with open_task_group() as tasks:
        for _ in range(_DATASETS_AT_A_TIME):
            tasks.start_soon(work)
    if errors:
        raise max(errors, key=_weight)
    return [results[dataset.dataset_id] for dataset in datasets]


def _weight(error: Exception) -> int:
    """Which of several errors counts; what is no MoverError is a defect, and the first to be seen."""
    return gravity(error.exit_code) if isinstance(error, MoverError) else sys.maxsize
