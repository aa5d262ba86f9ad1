"""Where jobs come in: bounded, each key once, durable before anybody is told."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import anyio
import msgspec

from mover.api import JobOrder, JobView
from mover.daemon_ids import JobIds
from mover.daemon_job_words import JobServiceConfig
from mover.daemon_ledger import Ledger, file_entries
from mover.daemon_runner import NoCatalogueError
from mover.daemon_store import Store
from mover.daemon_store_rows import find_key, insert_job, read_newest_id
from mover.daemon_store_schema import ItemRow, JobRow, NewJob
from mover.daemon_views import job_view
from mover.daemon_work import Work
from mover.errors import ConfigError, IntakeClosedError, QueueFullError

__all__ = ["Intake"]

_ENTRIES = "datasets and files"
_LEAST_WAIT_S, _MOST_WAIT_S, _USUAL_WAIT_S = 5.0, 600.0, 30.0


class Intake:
    """Accepts jobs for the work; ``open`` until it is set to False, ``accepted`` counts new ones."""

    def __init__(self, store: Store, ledger: Ledger, work: Work, config: JobServiceConfig) -> None:
        self._store, self._ledger, self._work, self._config = store, ledger, work, config
        self._ids = JobIds("", ledger.clock)
        self.open = True
        self.accepted = 0
        self._entering_jobs, self._entering_entries = 0, 0  # on their way into journal and ledger
        self._under_way: dict[str, anyio.Event] = {}

    async def prepare(self) -> None:
        """Ids go on after those that were given before.  Raises JournalError."""
        self._ids = JobIds(await self._store.read(read_newest_id), self._ledger.clock)

    async def submit(self, order: JobOrder, owner: str, key: str, catalogue_job: str) -> tuple[str, JobView | None]:
        """Id of the job, and the job if it is new.  Raises as ``JobService.submit``."""
        if catalogue_job and not self._work.has_catalogue:
            raise ConfigError("SCICAT_ENDPOINT", "", "the address of a catalogue, for its jobs")
        if order.options.registered and not self._work.has_catalogue:
            raise NoCatalogueError
        dataset_ids = tuple(dict.fromkeys(order.dataset_ids))
        digest = hashlib.sha256(msgspec.json.encode((order, catalogue_job))).digest()
        entries = len(dataset_ids) + file_entries(order.options)
        if not self.open or not self._fits(entries):
            known = await self._store.read(partial(find_key, caller=owner, key=key, digest=digest))
            if known:
                return known, None
            self._refuse(entries)
        with anyio.CancelScope(shield=True):  # a caller who goes away leaves no job behind that nobody works on
            row = self._new_row(order, owner, key, catalogue_job)
            items = [ItemRow(row.id, position, dataset_id) for position, dataset_id in enumerate(dataset_ids)]
            with self._entering(row.id, entries):
                job_id = await self._store.write(partial(insert_job, new=NewJob(row, dataset_ids, owner, digest)))
                job = await self._ledger.add(row, items) if job_id == row.id else None
            if job is not None:
                self.accepted += 1
                await self._work.queue(job)
                return job_id, job_view(row, items, {})
        return job_id, None

    async def until_entered(self, job_id: str) -> None:
        """Returns when a job that was accepted is also in the ledger, where it can be cancelled."""
        if job_id in self._under_way:
            await self._under_way[job_id].wait()

    @contextmanager
    def _entering(self, job_id: str, entries: int) -> Iterator[None]:
        """Counts what is on its way into journal and ledger; a large job is in both counts until it is there."""
        self._entering_jobs += 1
        self._entering_entries += entries
        entered = self._under_way[job_id] = anyio.Event()
        try:
            yield
        finally:
            self._entering_jobs -= 1
            self._entering_entries -= entries
            del self._under_way[job_id]
            entered.set()

    def _new_row(self, order: JobOrder, owner: str, key: str, catalogue_job: str) -> JobRow:
        now_ms = self._ledger.now_ms
        return JobRow(
            id=self._ids.next(),
            kind=order.kind,
            owner=order.owner or owner,
            priority=order.priority,
            options=order.options,
            accepted_ms=now_ms,
            changed_ms=now_ms,
            state="queued",
            reason="",
            key=key,
            catalogue_job=catalogue_job,
            cancelled_by="",
            last_number=now_ms,
        )

    def _fits(self, entries: int) -> bool:
        """``entries``: datasets, and files that the order names: they stay in memory until the job has ended."""
        jobs = len(self._ledger.jobs) + self._entering_jobs
        held = self._ledger.tally.datasets + self._ledger.files + self._entering_entries
        return jobs < self._config.jobs_limit and held + entries <= self._config.datasets_limit

    def _refuse(self, entries: int) -> None:
        """Raises IntakeClosedError, QueueFullError."""
        if not self.open:
            raise IntakeClosedError
        if len(self._ledger.jobs) + self._entering_jobs >= self._config.jobs_limit:
            raise QueueFullError("jobs", self._config.jobs_limit, self._retry_after_s())
        if not self._fits(entries):
            raise QueueFullError(_ENTRIES, self._config.datasets_limit, self._retry_after_s())

    def _retry_after_s(self) -> float:
        """About as long as the last few jobs took, one after another, to make room for one more."""
        ends_s = self._ledger.ends_s
        if len(ends_s) < 2:
            return _USUAL_WAIT_S
        each_s = (self._ledger.clock() - ends_s[0]) / len(ends_s)
        return float(math.ceil(min(max(each_s, _LEAST_WAIT_S), _MOST_WAIT_S)))
