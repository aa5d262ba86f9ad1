"""The jobs of the daemon: accepted durably, shared fairly, run in one engine, told to whoever listens."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from mover.api import DatasetView, JobEvent, JobKind, JobOrder, JobPage, JobState, JobView, LimitsChange, LimitView
from mover.catalogue import JobCatalogue
from mover.daemon_events import ProgressRelay
from mover.engine import Engine
from mover.policies.retry import RetryPolicy

__all__ = ["JobService", "JobServiceConfig", "OwnerStatistics", "QueueStatistics", "WorkView"]


class JobServiceConfig(msgspec.Struct, frozen=True):
    """``folder`` is made when missing, for the daemon alone: ``<ARCHIVER_SCRATCH_FOLDER>/daemon``.

    ``jobs_limit`` and ``datasets_limit``: unfinished ones that are held at most. ``datasets_at_a_time``: of each kind
    of job, so that archivals that wait for space hold up no retrieval. ``keep_days``: how long finished jobs are
    kept. ``retry``: a dataset whose failure passes. ``busy_patience_s``: how long a dataset waits for a run elsewhere.
    ``report_limit_bytes``: of the JSON of one dataset's report; what goes beyond it is left out and counted there.
    """

    folder: Path
    jobs_limit: int = 10_000
    datasets_limit: int = 100_000
    datasets_at_a_time: int = 4
    keep_days: float = 30.0
    retry: RetryPolicy = RetryPolicy(attempts=8, base_s=5.0, cap_s=600.0, throttle_base_s=30.0)
    busy_patience_s: float = 86_400.0
    report_limit_bytes: int = 16 << 20


class OwnerStatistics(msgspec.Struct, frozen=True):
    """Unfinished datasets of one owner."""

    owner: str
    queued: int
    waiting: int
    running: int


class WorkView(msgspec.Struct, frozen=True):
    """A dataset in work; ``since`` is when its attempt began."""

    job_id: str
    kind: JobKind
    owner: str
    dataset: DatasetView
    since: str


class QueueStatistics(msgspec.Struct, frozen=True):
    """The queue now, and what happened since the service was opened.

    Numbers of datasets, but for ``jobs`` and ``accepted``. ``oldest_age_s``: since the oldest job with datasets that
    were never begun was accepted; 0 when there is none. ``ended``: datasets by (kind, final state). ``retries``:
    failures that are tried again, by the error's kind. ``journal_error``: why the last write failed, else ''.
    """

    jobs: int
    queued: int
    waiting: int
    running: int
    oldest_age_s: float
    owners: tuple[OwnerStatistics, ...]
    working: tuple[WorkView, ...]
    accepted: int
    ended: dict[tuple[str, str], int]
    retries: dict[str, int]
    jobs_limit: int
    datasets_limit: int
    intake_open: bool
    journal_error: str = ""


class JobService:
    """Open it with :meth:`open`; belongs to the engine's event loop."""

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        engine: Engine,
        config: JobServiceConfig,
        *,
        progress: ProgressRelay,
        catalogue: JobCatalogue | None = None,
        clock: Callable[[], float] = time.time,
        rng: Callable[[], float] = random.random,
    ) -> AsyncIterator[JobService]:
        """Takes up what was accepted before, and works. ``progress`` is what the engine was opened with as ``tell``.

        ``catalogue``: where jobs with a ``catalogue_job`` are shown; it is the engine's own.

        Raises:
            DaemonRunningError: another daemon works on the folder.
            JournalError: it cannot be used.
        """
        raise NotImplementedError
        yield

    async def submit(
        self, order: JobOrder, *, owner: str, key: str = "", catalogue_job: str = ""
    ) -> tuple[JobView, bool]:
        """Accepts a job, durably; with a ``key`` that is known, that job. Returns it and whether it is new.

        ``owner``: the caller; the job runs on the account of ``order.owner``, if that is given.

        Raises:
            QueueFullError: too many unfinished jobs or datasets; it knows when to try again.
            KeyConflictError: the caller has used the key for another order.
            IntakeClosedError: the service is stopping.
            JournalError: it could not be made durable; nothing was accepted.
        """
        raise NotImplementedError

    async def job(self, job_id: str) -> JobView:
        """One job, with its changes, and reports as far as 16 MiB go.  Raises UnknownJobError, JournalError."""
        raise NotImplementedError

    async def dataset(self, job_id: str, dataset_id: str) -> DatasetView:
        """One dataset of a job, with its report.  Raises UnknownJobError, JournalError."""
        raise NotImplementedError

    async def jobs(
        self,
        *,
        state: JobState | None = None,
        owner: str | None = None,
        dataset_id: str | None = None,
        before: str = "",
        limit: int = 100,
    ) -> JobPage:
        """Jobs, newest first, without changes and reports.  Raises JournalError."""
        raise NotImplementedError

    async def cancel(self, job_id: str, *, who: str) -> JobView:
        """Ends a job: durably at once; running work stops at its next await. A finished job stays as it is.

        Raises:
            UnknownJobError, JournalError: it is not cancelled then.
        """
        raise NotImplementedError

    def events(self, job_id: str, after: int = 0) -> AsyncIterator[JobEvent]:
        """The job's events with numbers above ``after``: changes that are kept, how it stands, then live, to the end.

        A slow reader loses progress, never a change of state.

        Raises:
            UnknownJobError, JournalError: with the first event.
        """
        raise NotImplementedError

    def all_events(self, after: int = 0) -> AsyncIterator[JobEvent]:
        """Live events of all jobs, from now on; a reader that is 10,000 changes behind loses the oldest."""
        raise NotImplementedError

    def statistics(self) -> QueueStatistics:
        """The queue now."""
        raise NotImplementedError

    def limits(self) -> tuple[LimitView, ...]:
        """The engine's limits now."""
        raise NotImplementedError

    async def set_limits(self, change: LimitsChange) -> tuple[LimitView, ...]:
        """Changes the engine's limits until the next start."""
        raise NotImplementedError

    async def check_journal(self) -> None:
        """Writes to the journal.  Raises JournalError."""
        raise NotImplementedError

    def close_intake(self) -> None:
        """Takes no more jobs; what was accepted goes on."""
        raise NotImplementedError

    async def drain(self, deadline_s: float) -> None:
        """Takes no more jobs and begins nothing; what runs gets the time to end, and is then stopped where it is.

        All of it goes on with the next :meth:`open`.
        """
        raise NotImplementedError
