"""Jobs and slots that nobody looks after any more: what they need, and doing it. Every step may be repeated."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, Literal
from uuid import UUID

import msgspec
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort

from flows.limits import LIMIT_TAGS, limit_name
from flows.runs import bury_silent_runs, fate, live_jobs, runs_of_job, start_run
from flows.services import open_engine
from mover.catalogue import CatalogueJob, JobCatalogue
from mover.errors import MoverError
from mover.jobs_lifecycle import IN_PROGRESS, SUBMITTED, JobKind, is_finished
from mover.jobs_settle import settle_job
from mover.policies.reconciliation import End, Leave, RunFate, Start, next_step

__all__ = ["Action", "free_slots", "reconcile_all", "reconcile_job"]

_KINDS: Final[tuple[JobKind, ...]] = ("archive", "retrieve")
_TRIGGER_GRACE: Final = timedelta(seconds=60)  # the catalogue's own trigger comes first
_SLOT_GRACE: Final = timedelta(seconds=150)  # a lease of 60 s and the server's own sweep have long passed
_BUSY: Final = (StateType.PENDING, StateType.RUNNING, StateType.CANCELLING)


class Action(msgspec.Struct, frozen=True):
    """One thing that was done, or would be. ``target``: a job's id, a run's name, a limit's name."""

    what: Literal["run buried", "run started", "job ended", "slots freed", "failed"]
    target: str
    reason: str


async def reconcile_all(client: PrefectClient, catalogue: JobCatalogue, *, dry_run: bool = False) -> list[Action]:
    """Looks at every job that has not ended and at every limit; returns what it did, or with ``dry_run`` would do.

    Raises:
        MoverError: the list of jobs or the server refuses; what was done stays done.
    """
    actions: list[Action] = []
    for kind in _KINDS:
        if not dry_run:
            buried = await bury_silent_runs(client, kind)
            actions += [Action("run buried", run.name, "its heartbeats have stopped") for run in buried]
        live = await live_jobs(client, kind)
        async for job in catalogue.jobs([kind], [SUBMITTED, IN_PROGRESS]):
            if job.job_id in live or _is_new(job):
                continue
            runs = await runs_of_job(client, kind, job.job_id)
            try:
                actions += await _act(client, catalogue, kind, job, runs, dry_run=dry_run)
            except MoverError as error:  # the others get their turn
                actions.append(Action("failed", job.job_id, str(error)))
    return actions + await free_slots(client, dry_run=dry_run)


async def reconcile_job(
    client: PrefectClient,
    catalogue: JobCatalogue,
    kind: JobKind,
    job_id: str,
    *,
    cancelled_run: UUID | None = None,
) -> list[Action]:
    """Looks at one job, whose run has just ended. ``cancelled_run`` is still being cancelled, and counts as ended."""
    job = await catalogue.job(job_id)
    runs = await runs_of_job(client, kind, job_id)
    return await _act(client, catalogue, kind, job, runs, cancelled_run=cancelled_run)


async def _act(
    client: PrefectClient,
    catalogue: JobCatalogue,
    kind: JobKind,
    job: CatalogueJob,
    runs: Sequence[FlowRun],
    *,
    cancelled_run: UUID | None = None,
    dry_run: bool = False,
) -> list[Action]:
    fates: list[RunFate] = ["cancelled" if run.id == cancelled_run else fate(run) for run in runs]
    match next_step(finished=is_finished(job.status_code), fates=fates):
        case Leave():
            return []
        case Start(attempt, reason):
            if not dry_run:
                await start_run(client, kind, job.job_id, attempt, runs[-1] if runs else None)
            return [Action("run started", job.job_id, f"{reason}; attempt {attempt}")]
        case End(state, message):
            if not dry_run:
                async with open_engine(catalogue) as engine:
                    await settle_job(engine, catalogue, job, kind, state, message)
            return [Action("job ended", job.job_id, message)]


def _is_new(job: CatalogueJob) -> bool:
    if job.status_code != SUBMITTED or not job.created_at:
        return False
    try:
        return datetime.now(UTC) - datetime.fromisoformat(job.created_at) < _TRIGGER_GRACE
    except (TypeError, ValueError):  # a time that is none, or none of a zone, does not keep the job waiting
        return False


async def free_slots(client: PrefectClient, *, dry_run: bool, now: datetime | None = None) -> list[Action]:
    """Frees slots that are taken though no run has been at work for longer than any lease lasts.

    Leases bring the slots of killed runs back; a server that dies between lending a slot and noting the lease loses it.
    """
    ours = {limit_name(tag) for tag in LIMIT_TAGS.values()}
    taken = [
        limit
        for limit in await client.read_global_concurrency_limits(limit=200)
        if limit.name in ours and limit.active_slots
    ]
    if not taken or not await _all_quiet(client, now or datetime.now(UTC)):
        return []
    for limit in taken:
        if not dry_run:
            await client.update_global_concurrency_limit(limit.name, GlobalConcurrencyLimitUpdate(active_slots=0))
    return [Action("slots freed", limit.name, f"{limit.active_slots} taken, and nothing runs") for limit in taken]


async def _all_quiet(client: PrefectClient, now: datetime) -> bool:
    """Whether no flow run at all is at work, nor was one lately."""
    busy = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(_BUSY))))
    if len(await client.read_flow_runs(flow_run_filter=busy, limit=2)) > 1:  # one: the reconciler itself
        return False
    # Runs that have not ended sort before all others on some databases.
    over = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(TERMINAL_STATES))))
    last = await client.read_flow_runs(flow_run_filter=over, sort=FlowRunSort.END_TIME_DESC, limit=1)
    ended = last[0].end_time if last else None
    return ended is None or now - ended > _SLOT_GRACE
