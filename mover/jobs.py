"""A job of the catalogue from its order to its result: every dataset by itself, the catalogue true at every moment.

``begin`` → ``archive`` or ``retrieve`` of each dataset → ``finish``. ``jobs_settle`` ends a job whose run is gone.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

import msgspec

from mover.catalogue import CatalogueJob, JobCatalogue, JobDataset, Lifecycle
from mover.errors import (
    DatasetBusyError,
    JobFinishedError,
    JobMismatchError,
    JobNotFoundError,
    MoverError,
)
from mover.jobs_lifecycle import (
    FINISHED_WITH_DATASET_ERRORS,
    IN_PROGRESS,
    DatasetOutcome,
    JobKind,
    failure_outcome,
    is_finished,
    is_started,
    job_verdict,
    outcome_lifecycle,
    started_lifecycle,
)
from mover.jobs_result import archived_outcome, retrieved_outcome
from mover.policies.busy import while_busy
from mover.reports import ArchiveReport, RetrieveReport

__all__ = ["DatasetEngine", "DatasetResult", "JobRunner", "Passes", "merged_datasets", "tell", "update_job"]

R = TypeVar("R", ArchiveReport, RetrieveReport)
Passes = Callable[[MoverError], bool]

_log = logging.getLogger(__name__)

_PATIENCE_S: Final = 86_400.0


def _never(_error: MoverError) -> bool:
    return False


class DatasetResult(msgspec.Struct, Generic[R], frozen=True):
    """One dataset of a job: what is told about it, the engine's report when it is done, and else the error."""

    outcome: DatasetOutcome
    report: R | None = None
    error: MoverError | None = None


class DatasetEngine(Protocol):
    """What a job needs of an engine: this process's, or one that is elsewhere."""

    async def archive(self, dataset_id: str, *, release_source: bool = False) -> ArchiveReport:
        """See ``Engine.archive``."""
        ...

    async def retrieve(
        self, dataset_id: str, *, files: Sequence[str] = (), form: Literal["datablocks", "files"] = "datablocks"
    ) -> RetrieveReport:
        """See ``Engine.retrieve``."""
        ...


class JobRunner:
    """Runs the datasets of jobs in an engine and keeps the catalogue's books.

    ``patience_s``: how long a dataset waits for another run that holds it; ``on_wait`` is told (dataset, who).
    """

    def __init__(
        self,
        engine: DatasetEngine,
        catalogue: JobCatalogue,
        *,
        patience_s: float = _PATIENCE_S,
        on_wait: Callable[[str, str], None] = lambda _dataset_id, _reason: None,
    ) -> None:
        self._engine, self._catalogue = engine, catalogue
        self._patience_s, self._on_wait = patience_s, on_wait

    async def read(
        self, job_id: str, kind: JobKind, dataset_ids: Sequence[str] | None = None, *, again: bool = False
    ) -> tuple[JobDataset, ...]:
        """The datasets of a job, each once; ``dataset_ids`` picks some of them. Nothing is written.

        Raises:
            JobNotFoundError: the catalogue does not know the job.
            JobMismatchError: it is a job of another kind, or a dataset is not in it.
            JobFinishedError: it has ended; ``again`` takes it all the same.
        """
        job = await self._catalogue.job(job_id)
        if job.kind != kind:
            raise JobMismatchError(job_id, f"it is of type {job.kind!r}, not {kind!r}")
        if is_finished(job.status_code) and not again:
            raise JobFinishedError(job_id, job.status_code)
        datasets = merged_datasets(job)
        if dataset_ids is None:
            return tuple(datasets.values())
        unknown = [dataset_id for dataset_id in dataset_ids if dataset_id not in datasets]
        if unknown:
            raise JobMismatchError(job_id, f"dataset {unknown[0]!r} is not in it")
        return tuple(datasets[dataset_id] for dataset_id in dict.fromkeys(dataset_ids))

    async def begin(self, job_id: str, message: str) -> None:
        """Shows that somebody works on the job."""
        await update_job(self._catalogue, job_id, IN_PROGRESS, message)

    async def archive(
        self, dataset_id: str, *, release_source: bool, passes: Passes = _never
    ) -> DatasetResult[ArchiveReport]:
        """Archives one dataset of a job; failures are results, already told to the catalogue.

        Those that ``passes`` says the caller comes back for are raised; the catalogue then goes on showing work.
        """

        async def work() -> ArchiveReport:
            return await self._engine.archive(dataset_id, release_source=release_source)

        return await self._run("archive", dataset_id, work, archived_outcome, passes)

    async def retrieve(self, dataset: JobDataset, *, passes: Passes = _never) -> DatasetResult[RetrieveReport]:
        """Retrieves one dataset of a job, or files of it; failures as with ``archive``."""

        async def work() -> RetrieveReport:
            return await self._engine.retrieve(dataset.dataset_id, files=dataset.files)

        return await self._run("retrieve", dataset.dataset_id, work, retrieved_outcome, passes)

    async def finish(
        self,
        job_id: str,
        kind: JobKind,
        outcomes: Sequence[DatasetOutcome],
        result: Mapping[str, Any],
        *,
        again: bool = False,
    ) -> str:
        """Ends the job with the verdict over its datasets; returns the status code.

        A job that another run has ended meanwhile stays as it is, unless ``again``.
        """
        if not again:
            now = await self._catalogue.job(job_id)
            if is_finished(now.status_code):
                return now.status_code
        if outcomes:
            code, message = job_verdict(kind, outcomes)
        else:
            code, message = FINISHED_WITH_DATASET_ERRORS, "the job names no dataset"
        await update_job(self._catalogue, job_id, code, message, dict(result))
        return code

    async def _run(
        self,
        kind: JobKind,
        dataset_id: str,
        work: Callable[[], Awaitable[R]],
        done: Callable[[R], DatasetOutcome],
        passes: Passes,
    ) -> DatasetResult[R]:
        """Raises a retryable MoverError also for a catalogue that cannot be told: somebody has to come back."""
        try:
            before = await self._catalogue.lifecycle(dataset_id)
            if not is_started(kind, before):  # else a run that works on it may be writing, and is the only one to write
                await self._catalogue.update_lifecycle(dataset_id, started_lifecycle(kind, before))
        except MoverError as error:
            if error.retryable:
                raise
            return DatasetResult(failure_outcome(dataset_id, error), error=error)
        report: R | None = None
        failure: MoverError | None = None
        try:
            report = await while_busy(work, self._patience_s, lambda reason: self._on_wait(dataset_id, reason))
            outcome = done(report)
        except DatasetBusyError as error:
            outcome = failure_outcome(dataset_id, error)
            await self._give_up_waiting(kind, before, outcome)
            return DatasetResult(outcome, error=error)
        except MoverError as error:
            if passes(error):
                raise
            _log.warning("%s of %s failed: %s", kind, dataset_id, error)
            outcome, failure = failure_outcome(dataset_id, error), error
        return DatasetResult(await tell(self._catalogue, kind, outcome), report, failure)

    async def _give_up_waiting(self, kind: JobKind, before: Lifecycle, outcome: DatasetOutcome) -> None:
        """Another job's run tells how its dataset goes; what holds it by hand tells nobody, so all is as before.

        What a dead run left at work before that is a failure: the other job's run, if there is one, corrects it.
        """
        if not is_started(kind, await self._catalogue.lifecycle(outcome.dataset_id)):
            return
        if is_started(kind, before):
            await tell(self._catalogue, kind, outcome)
        else:
            await self._catalogue.update_lifecycle(outcome.dataset_id, before)


async def tell(catalogue: JobCatalogue, kind: JobKind, outcome: DatasetOutcome) -> DatasetOutcome:
    """Shows an outcome with its dataset. What the catalogue refuses to show is the facility's error, and returned."""
    try:
        now = await catalogue.lifecycle(outcome.dataset_id)  # another run may have archived it meanwhile
        await catalogue.update_lifecycle(outcome.dataset_id, outcome_lifecycle(kind, now, outcome))
    except MoverError as error:
        if error.retryable:
            raise
        _log.warning("the catalogue does not take the outcome of %s: %s", outcome.dataset_id, error)
        return outcome if outcome.state != "done" else failure_outcome(outcome.dataset_id, error)
    return outcome


async def update_job(
    catalogue: JobCatalogue, job_id: str, code: str, message: str, result: dict[str, Any] | None = None
) -> None:
    """Sets the job's state. One of which a dataset was deleted takes none; the others are served all the same."""
    try:
        await catalogue.update_job(job_id, code, message, result)
    except JobNotFoundError as error:
        _log.warning("the catalogue does not take %s: %s (%s)", code, message, error)


def merged_datasets(job: CatalogueJob) -> dict[str, JobDataset]:
    """The job's datasets by id, each once; one that is named whole anywhere is meant whole."""
    merged: dict[str, JobDataset] = {}
    for dataset in job.datasets:
        known = merged.get(dataset.dataset_id)
        if known is None:
            merged[dataset.dataset_id] = dataset
        else:
            files = (*known.files, *dataset.files) if known.files and dataset.files else ()
            merged[dataset.dataset_id] = JobDataset(dataset.dataset_id, tuple(dict.fromkeys(files)))
    return merged
