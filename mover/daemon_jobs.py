"""The jobs of the daemon: accepted durably, shared fairly, run in one engine, told to whoever listens."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import anyio

from mover.api import (
    DatasetView,
    JobEvent,
    JobOrder,
    JobPage,
    JobState,
    JobView,
    LimitsChange,
    LimitView,
)
from mover.catalogue import JobCatalogue
from mover.daemon_book import Live
from mover.daemon_catalogue_runs import CatalogueRunner
from mover.daemon_events import EventHub, ProgressRelay
from mover.daemon_intake import Intake
from mover.daemon_job_words import JobServiceConfig, OwnerStatistics, QueueStatistics, WorkView
from mover.daemon_ledger import Ledger
from mover.daemon_queries import read_dataset_view, read_job_view, read_page
from mover.daemon_runner import EngineRunner, Runner
from mover.daemon_store import Store
from mover.daemon_store_rows import (
    check,
    read_unfinished,
    request_cancel,
    trim,
)
from mover.daemon_streams import all_events, job_events
from mover.daemon_views import dataset_view, iso_ms
from mover.daemon_work import Work, WorkRules
from mover.engine import Engine
from mover.errors import JournalError
from mover.model import Progress, Stage
from mover.tasks import open_task_group

__all__ = ["JobService", "JobServiceConfig", "OwnerStatistics", "QueueStatistics", "WorkView"]

_log = logging.getLogger(__name__)

_TRIM_EVERY_S: Final = 3_600.0
_TRIM_DATASETS: Final = 2_000  # in one step: nobody waits for long behind it
_TRIM_PAUSE_S: Final = 0.1
_DAY_MS: Final = 86_400_000


class JobService:
    """Open it with :meth:`open`; belongs to the engine's event loop."""

    def __init__(self, engine: Engine, config: JobServiceConfig, store: Store, ledger: Ledger, work: Work) -> None:
        self._engine, self._config, self._store, self._ledger, self._work = engine, config, store, ledger, work
        self._intake = Intake(store, ledger, work, config)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        engine: Engine,
        config: JobServiceConfig,
        *,
        progress: ProgressRelay,
        catalogue: JobCatalogue | None = None,
        runner: Runner | None = None,
        clock: Callable[[], float] = time.time,
        rng: Callable[[], float] = random.random,
    ) -> AsyncIterator[JobService]:
        """Takes up what was accepted before, and works. ``progress`` is what the engine was opened with as ``tell``.

        ``catalogue``: where jobs with a ``catalogue_job`` are shown; it is the engine's own. ``runner`` runs datasets
        of other jobs, in the engine if it is not given.

        Raises:
            DaemonRunningError: another daemon works on the folder.
            JournalError: it cannot be used.
        """
        async with Store.open(config.folder) as store:
            ledger = Ledger(store, EventHub(), clock)
            plain = EngineRunner(engine, config.report_limit_bytes)
            told = None
            if catalogue is not None:
                told = CatalogueRunner(engine, catalogue, plain.pack, _waits(progress), store, ledger, config.retry)
            work = Work(ledger, _rules(config, rng, engine), runner or plain, told)
            service = cls(engine, config, store, ledger, work)
            await service._take_up()
            unsubscribe = progress.subscribe(work.tell)
            try:
                async with open_task_group() as tasks:
                    tasks.start_soon(work.run)
                    tasks.start_soon(service._trim)
                    yield service
                    service.close_intake()
                    await work.stop(0.0)
                    tasks.cancel_scope.cancel()
            finally:
                unsubscribe()

    async def _take_up(self) -> None:
        await self._intake.prepare()
        entries = [await self._work.take_up(row, items) for row, items in await self._store.read(read_unfinished)]
        for entry in entries:
            if entry is not None:
                await self._ledger.settle(entry)

    async def submit(
        self, order: JobOrder, *, owner: str, key: str = "", catalogue_job: str = ""
    ) -> tuple[JobView, bool]:
        """Accepts a job, durably; with a ``key`` that is known, that job. Returns it and whether it is new.

        ``owner``: the caller, whose keys are compared; the job runs on the account of ``order.owner`` if that is given.

        Raises:
            QueueFullError: too many unfinished jobs or datasets; it knows when to try again.
            KeyConflictError: the caller has used the key for another order.
            IntakeClosedError: the service is stopping.
            ConfigError, NoCatalogueError: it is a job of the catalogue, or counts on it, and there is none.
            JournalError: it could not be made durable; nothing was accepted.
        """
        job_id, view = await self._intake.submit(order, owner, key, catalogue_job)
        return (view, True) if view is not None else (await self.job(job_id), False)

    async def job(self, job_id: str) -> JobView:
        """One job, with its changes, and reports as far as 8 MiB go.  Raises UnknownJobError, JournalError."""
        return await self._store.read(partial(read_job_view, job_id=job_id, live=self._live(job_id)))

    async def dataset(self, job_id: str, dataset_id: str) -> DatasetView:
        """One dataset of a job, with its report.  Raises UnknownJobError, JournalError."""
        step = partial(read_dataset_view, job_id=job_id, dataset_id=dataset_id, live=self._live(job_id))
        return await self._store.read(step)

    async def jobs(
        self,
        *,
        state: JobState | None = None,
        owner: str | None = None,
        dataset_id: str | None = None,
        before: str = "",
        limit: int = 100,
    ) -> JobPage:
        """Jobs, newest first, without changes and reports.

        A page has up to ``limit`` jobs, fewer when they come to more than 10,000 datasets or 8 MiB.

        Raises:
            JournalError: it cannot be read.
        """
        wanted = (("state", state), ("owner", owner), ("dataset_id", dataset_id))
        where = [(name, str(value)) for name, value in wanted if value is not None]
        live = {item.job.row.id: self._live(item.job.row.id) for item in self._work.in_work.values()}
        return await self._store.read(partial(read_page, where=where, before=before, limit=limit, live=live))

    def _live(self, job_id: str) -> dict[int, Live]:
        in_work = [item for item in self._work.in_work.values() if item.job.row.id == job_id]
        return {item.row.position: item.live for item in in_work if item.live is not None}

    async def cancel(self, job_id: str, *, who: str) -> JobView:
        """Ends a job: durably at once; running work stops at its next await. A finished job stays as it is.

        Raises:
            UnknownJobError, JournalError: it is not cancelled then.
        """
        await self._intake.until_entered(job_id)
        job = self._ledger.jobs.get(job_id)
        if job is not None and not job.row.cancelled_by:
            with anyio.CancelScope(shield=True):
                await self._store.write(partial(request_cancel, job_id=job_id, who=who))
                if job_id in self._ledger.jobs and not job.row.cancelled_by:
                    await self._work.cancel(job, who)
        return await self.job(job_id)

    def events(self, job_id: str, after: int = 0) -> AsyncIterator[JobEvent]:
        """The job's events with numbers above ``after``: changes that are kept, how it stands, then live, to the end.

        A slow reader loses progress, never a change of state.

        Raises:
            UnknownJobError, JournalError: with the first event.
        """
        return job_events(self._store, self._ledger, job_id, after)

    def all_events(self) -> AsyncIterator[JobEvent]:
        """Live events of all jobs, from now on; a reader that is 10,000 changes behind loses the oldest.

        Their numbers grow within each job, so none of them says where among all events a reader was.
        """
        return all_events(self._ledger)

    def statistics(self) -> QueueStatistics:
        """The queue now."""
        ledger, work = self._ledger, self._work
        owners = tuple(
            OwnerStatistics(owner, counts["queued"], counts["waiting"], counts["running"])
            for owner, counts in sorted(ledger.tally.owners.items())
        )
        not_begun = (job.row.accepted_ms for job in ledger.jobs.values() if job.items and not job.begun)
        oldest = next(not_begun, ledger.now_ms)
        return QueueStatistics(
            jobs=len(ledger.jobs),
            queued=sum(owner.queued for owner in owners),
            waiting=sum(owner.waiting for owner in owners),
            running=sum(owner.running for owner in owners),
            oldest_age_s=max(0.0, (ledger.now_ms - oldest) / 1000),
            owners=owners,
            working=tuple(
                WorkView(
                    job_id=item.job.row.id,
                    kind=item.job.row.kind,
                    owner=item.owner,
                    dataset=dataset_view(item.row, item.live),
                    since=iso_ms(item.live.began_ms),
                )
                for item in work.in_work.values()
                if item.live is not None
            ),
            accepted=self._intake.accepted,
            ended=dict(ledger.ended),
            retries=dict(work.retries),
            jobs_limit=self._config.jobs_limit,
            datasets_limit=self._config.datasets_limit,
            intake_open=self._intake.open,
            journal_error=self._store.error,
        )

    def limits(self) -> tuple[LimitView, ...]:
        """The engine's limits now."""
        return tuple(
            LimitView(item.name, item.slots, item.holders, item.waiting, item.peak) for item in self._engine.limits()
        )

    async def set_limits(self, change: LimitsChange) -> tuple[LimitView, ...]:
        """Changes the engine's limits until the next start.  Raises ConfigError: nothing is changed then."""
        slots = {name: getattr(change, name) for name in change.__struct_fields__}
        self._engine.set_limits({name: number for name, number in slots.items() if number is not None})
        return self.limits()

    async def check_journal(self) -> None:
        """Writes to the journal.  Raises JournalError."""
        await self._store.write(check)

    def close_intake(self) -> None:
        """Takes no more jobs; what was accepted goes on."""
        self._intake.open = False

    async def drain(self, deadline_s: float) -> None:
        """Takes no more jobs and begins nothing; what runs gets the time to end, and is then stopped where it is.

        All of it goes on with the next :meth:`open`.
        """
        self.close_intake()
        await self._work.stop(deadline_s)

    async def _trim(self) -> None:
        """Forgets jobs that ended long ago, a few at a time."""
        while True:
            before_ms = self._ledger.now_ms - int(self._config.keep_days * _DAY_MS)
            try:
                while await self._store.write(partial(trim, before_ms=before_ms, datasets=_TRIM_DATASETS)):
                    await self._store.give_back()
                    await anyio.sleep(_TRIM_PAUSE_S)
            except JournalError as error:
                _log.warning("old jobs stay for now: %s", error)
            await anyio.sleep(_TRIM_EVERY_S)


def _waits(progress: ProgressRelay) -> Callable[[str, str], None]:
    """Tells of a dataset that waits for a run elsewhere, as the engine tells of other waits."""
    return lambda dataset_id, reason: progress.tell(Progress(dataset_id, Stage.LOCK, "waiting", reason=reason))


def _rules(config: JobServiceConfig, rng: Callable[[], float], engine: Engine) -> WorkRules:
    return WorkRules(config.datasets_at_a_time, config.retry, config.busy_patience_s, rng, engine.limits)
