"""Jobs and slots that nobody looks after any more: what they need, and doing it. Every step may be repeated."""

from __future__ import annotations

from collections.abc import Awaitable, Collection
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
from flows.progress import run_logger
from flows.runs import (
    bury_silent_runs,
    fate,
    hand_runs,
    live_jobs,
    next_number,
    runs_of_job,
    since_asked,
    start_run,
)
from flows.settling import open_settling
from mover.catalogue import CatalogueJob, JobCatalogue
from mover.errors import DatasetNotFoundError, MoverError
from mover.jobs_lifecycle import IN_PROGRESS, SUBMITTED, DatasetOutcome, JobKind, OutcomeState, is_finished, is_started
from mover.jobs_settle import OpenEngine, settle_dataset, settle_job
from mover.policies.reconciliation import End, Leave, RunFate, Start, next_step

__all__ = ["Action", "free_slots", "reconcile_all", "reconcile_job"]

_KINDS: Final[tuple[JobKind, ...]] = ("archive", "retrieve")
_TRIGGER_GRACE: Final = timedelta(seconds=60)  # the catalogue's own trigger comes first
_SLOT_GRACE: Final = timedelta(seconds=150)  # a lease of 60 s and the server's own sweep have long passed
_BUSY: Final = (StateType.PENDING, StateType.RUNNING, StateType.CANCELLING)


class Action(msgspec.Struct, frozen=True):
    """One thing that was done, or would be. ``target``: a job's or dataset's id, a run's name, a limit's name."""

    what: Literal["run buried", "run started", "job ended", "dataset settled", "slots freed", "failed"]
    target: str
    reason: str


async def reconcile_all(client: PrefectClient, catalogue: JobCatalogue, *, dry_run: bool = False) -> list[Action]:
    """Looks at every job that has not ended and at every limit; returns what it did, or with ``dry_run`` would do.

    Raises:
        MoverError: the list of jobs or the server refuses; what was done stays done.
    """
    actions: list[Action] = []
    if not dry_run:
        buried = await bury_silent_runs(client)
        actions += [Action("run buried", run.name, "its heartbeats have stopped") for run in buried]
    actions += await free_slots(client, dry_run=dry_run)
    async with open_settling(catalogue) as open_engine:
        for kind in _KINDS:
            live = await live_jobs(client, kind)
            awaited: set[str] = set()
            async for job in catalogue.jobs([kind], [SUBMITTED, IN_PROGRESS]):
                awaited.update(dataset.dataset_id for dataset in job.datasets)
                if job.job_id in live or _is_new(job):
                    continue
                actions += await _attempted(
                    job.job_id, _look_at(client, catalogue, open_engine, kind, job, dry_run=dry_run)
                )
            actions += await _settle_hand_runs(client, catalogue, open_engine, kind, awaited, dry_run=dry_run)
    return actions


async def _attempted(target: str, work: Awaitable[list[Action]]) -> list[Action]:
    """What the work did; when it fails the others get their turn all the same."""
    try:
        return await work
    except MoverError as error:
        return [Action("failed", target, str(error))]
    except Exception as error:  # noqa: BLE001 - a job that nobody understands takes no other one with it
        run_logger().exception("%s is left for the next round", target)
        return [Action("failed", target, f"{type(error).__name__}: {error}")]


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
    async with open_settling(catalogue) as open_engine:
        return await _look_at(client, catalogue, open_engine, kind, job, cancelled_run=cancelled_run)


async def _look_at(
    client: PrefectClient,
    catalogue: JobCatalogue,
    open_engine: OpenEngine,
    kind: JobKind,
    job: CatalogueJob,
    *,
    cancelled_run: UUID | None = None,
    dry_run: bool = False,
) -> list[Action]:
    """Does what the job needs, as its runs stand."""
    runs = await runs_of_job(client, kind, job.job_id)
    fates: list[RunFate] = ["cancelled" if run.id == cancelled_run else fate(run) for run in since_asked(runs)]
    match next_step(finished=is_finished(job.status_code), fates=fates):
        case Leave():
            return []
        case Start(attempt, reason):
            if not dry_run:
                await start_run(client, kind, job.job_id, next_number(runs), runs[-1] if runs else None)
            return [Action("run started", job.job_id, f"{reason}; attempt {attempt}")]
        case End(state, message):
            if not dry_run:
                await settle_job(open_engine, catalogue, job, kind, state, message)
            return [Action("job ended", job.job_id, message)]


async def _settle_hand_runs(
    client: PrefectClient,
    catalogue: JobCatalogue,
    open_engine: OpenEngine,
    kind: JobKind,
    awaited: Collection[str],
    *,
    dry_run: bool,
) -> list[Action]:
    """Settles datasets that a run for their own sake left at work: no job's end will ever tell of them.

    Those of unfinished jobs, ``awaited``, and of other runs that live are in somebody's hands.
    """
    ended = {
        dataset_id: item.run for item in await hand_runs(client, kind, live=False) for dataset_id in item.dataset_ids
    }
    if not ended:
        return []
    held = {dataset_id for item in await hand_runs(client, kind, live=True) for dataset_id in item.dataset_ids}
    actions: list[Action] = []
    for dataset_id in sorted(ended.keys() - set(awaited) - held):
        work = _settle_dataset(catalogue, open_engine, kind, dataset_id, ended[dataset_id], dry_run=dry_run)
        actions += await _attempted(dataset_id, work)
    return actions


async def _settle_dataset(
    catalogue: JobCatalogue, open_engine: OpenEngine, kind: JobKind, dataset_id: str, run: FlowRun, *, dry_run: bool
) -> list[Action]:
    try:
        if not is_started(kind, await catalogue.lifecycle(dataset_id)):
            return []
    except DatasetNotFoundError:
        return []
    cancelled = fate(run) == "cancelled"
    state: OutcomeState = "cancelled" if cancelled else "system-error"
    how = "an administrator cancelled it" if cancelled else "the archive system failed, its process was killed"
    message = f"flow run {run.name}: {how}; it can be run again"
    if not dry_run:
        await settle_dataset(open_engine, catalogue, kind, DatasetOutcome(dataset_id, state, message))
    return [Action("dataset settled", dataset_id, message)]


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
