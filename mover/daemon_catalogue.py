"""Jobs of the catalogue that the daemon runs by itself: started when told of, and found again when nobody told."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Final

import anyio

from mover.api import JobOptions, JobOrder, JobState, JobView
from mover.catalogue import CatalogueJob, JobCatalogue
from mover.daemon_jobs import JobService
from mover.engine import Engine
from mover.errors import JobFinishedError, JobMismatchError, KeyConflictError, MoverError
from mover.jobs import merged_datasets, update_job
from mover.jobs_lifecycle import FINISHED_WITH_DATASET_ERRORS, IN_PROGRESS, SUBMITTED, JobKind, is_finished
from mover.jobs_settle import settle_job, this_engine
from mover.policies.reconciliation import End, Leave, RunFate, Start, next_step

__all__ = ["CATALOGUE_OWNER", "CatalogueStarter"]

CATALOGUE_OWNER: Final = "scicat"
"""On whose account jobs of the catalogue run."""

_CALLER: Final = ":scicat"  # whose keys they have; no token has this name, as none holds a colon

_KINDS: Final[tuple[JobKind, ...]] = ("archive", "retrieve")
_PAGES: Final = 20  # of older jobs of a dataset that are looked through for one of the catalogue's job
_FATES: Final[dict[JobState, RunFate]] = {"done": "completed", "failed": "failed", "cancelled": "cancelled"}

_log = logging.getLogger(__name__)


class CatalogueStarter:
    """Has jobs of the catalogue run by the daemon's own service; a ``Starter``.

    ``release_source``: whether archived datasets leave the landing zone, as the flows have it. ``grace_s``: age from
    which on a job that nobody told of is looked at; the catalogue's own trigger comes first.
    """

    def __init__(
        self,
        service: JobService,
        catalogue: JobCatalogue,
        engine: Engine,
        *,
        release_source: bool = True,
        grace_s: float = 60.0,
    ) -> None:
        self._service, self._catalogue, self._engine = service, catalogue, engine
        self._release_source, self._grace_s = release_source, grace_s

    async def start(self, kind: JobKind, job_id: str) -> str:
        """See ``Starter``; returns the id of the daemon's job.

        Raises:
            JobNotFoundError, JobMismatchError, JobFinishedError: there is nothing to start.
            QueueFullError, IntakeClosedError, JournalError: it is not taken now.
            CatalogueAccessError, CatalogueTransientError: the job cannot be read.
        """
        job = await self._catalogue.job(job_id)
        if job.kind != kind:
            raise JobMismatchError(job_id, f"it is of type {job.kind!r}, not {kind!r}")
        if is_finished(job.status_code):
            raise JobFinishedError(job_id, job.status_code)
        return await self._look_at(job, kind)

    async def watch(self, interval_s: float, *, sleep: Callable[[float], Awaitable[None]] = anyio.sleep) -> None:
        """Looks at all jobs that have not ended, now and every so often; what fails is tried with the next look."""
        while True:
            try:
                await self.reconcile()
            except MoverError as error:
                _log.warning("the catalogue's jobs cannot be looked at: %s", error)
            except Exception:  # noqa: BLE001 - the daemon has other things to do
                _log.exception("the catalogue's jobs cannot be looked at")
            await sleep(interval_s)

    async def reconcile(self) -> list[str]:
        """Starts jobs that nobody works on, and ends those that have failed too often; returns their ids.

        Raises:
            MoverError: the catalogue cannot be read.
        """
        acted: list[str] = []
        for kind in _KINDS:
            async for job in self._catalogue.jobs([kind], [SUBMITTED, IN_PROGRESS]):
                if _age_s(job) < self._grace_s:
                    continue
                try:
                    if await self._look_at(job, kind, take_over=False):
                        acted.append(job.job_id)
                except MoverError as error:  # the others get their turn
                    _log.warning("%s job %s: %s", kind, job.job_id, error)
                except Exception:  # noqa: BLE001 - a job that nobody understands takes no other one with it
                    _log.exception("%s job %s", kind, job.job_id)
        return acted

    async def _look_at(self, job: CatalogueJob, kind: JobKind, *, take_over: bool = True) -> str:
        """Does what the job needs. Returns the daemon's job that is or was at it; '' when a look finds all well.

        One in progress of which nothing is known here is somebody else's, unless SciCat has just told of it.
        """
        if not job.datasets:
            await update_job(self._catalogue, job.job_id, FINISHED_WITH_DATASET_ERRORS, "the job names no dataset")
            return "-"
        runs = await self._runs_of(job)
        if not runs and job.status_code != SUBMITTED and not take_over:
            return ""
        step = next_step(finished=False, fates=[_FATES.get(run.state, "live") for run in runs])
        if runs and not isinstance(step, Leave) and is_finished((await self._catalogue.job(job.job_id)).status_code):
            step = Leave("it has ended since the catalogue was asked for its list")
        match step:
            case Leave():
                return runs[-1].id if take_over else ""
            case Start(attempt, reason):
                _log.info("%s job %s: %s; attempt %d", kind, job.job_id, reason, attempt)
                return await self._submit(job, kind, attempt)
            case End(state, message):
                await settle_job(this_engine(self._engine), self._catalogue, job, kind, state, message)
                return runs[-1].id

    async def _submit(self, job: CatalogueJob, kind: JobKind, attempt: int) -> str:
        options = JobOptions(release_source=self._release_source) if kind == "archive" else JobOptions()
        order = JobOrder(kind, tuple(merged_datasets(job)), options, owner=CATALOGUE_OWNER)
        key = f"scicat/{kind}/{job.job_id}/{attempt}"
        try:
            taken, _ = await self._service.submit(order, owner=_CALLER, key=key, catalogue_job=job.job_id)
        except KeyConflictError as error:  # the catalogue's list has changed since: the first order stands
            return error.job_id
        return taken.id

    async def _runs_of(self, job: CatalogueJob) -> list[JobView]:
        """The daemon's jobs for it, oldest first."""
        found: list[JobView] = []
        before = ""
        for _ in range(_PAGES):
            page = await self._service.jobs(dataset_id=job.datasets[0].dataset_id, before=before, limit=100)
            found += [view for view in page.jobs if view.catalogue_job == job.job_id]
            before = page.next
            if not before:
                break
        return found[::-1]


def _age_s(job: CatalogueJob) -> float:
    """Seconds since somebody ordered it; endless for one that is in progress."""
    if job.status_code != SUBMITTED or not job.created_at:
        return math.inf
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(job.created_at)).total_seconds()
    except (TypeError, ValueError):  # a time that is none, or none of a zone, does not keep the job waiting
        return math.inf
