"""The flow runs of jobs as Prefect knows them: found by job, started once per attempt, declared dead when they are."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterName,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events.filters import EventFilter, EventNameFilter, EventOccurredFilter, EventResourceFilter
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from mover.errors import ConfigError
from mover.jobs_lifecycle import JobKind
from mover.policies.reconciliation import RunFate

__all__ = [
    "DEPLOYMENTS",
    "NEVER_HEARD_S",
    "SILENCE_S",
    "HandRun",
    "bury_silent_runs",
    "fate",
    "hand_runs",
    "live_jobs",
    "next_number",
    "runs_of_job",
    "since_asked",
    "start_run",
]

DEPLOYMENTS: Final[dict[JobKind, str]] = {
    "archive": "archive_datasetlist/datasets_archival",
    "retrieve": "retrieve_datasetlist/datasets_retrieval",
}
"""Deployment that runs each kind of job."""

SILENCE_S: Final = 600.0
"""A run that sent heartbeats and has sent none for so long is dead. The automation is faster; this one is right also
for runs that somebody started with Prefect's own 180 s between two of them."""

NEVER_HEARD_S: Final = 1800.0
"""A run that is pending or running and never sent a heartbeat is dead: an image may take minutes to arrive."""

_FLOWS: Final = (
    *("archive_datasetlist", "archive_dataset", "retrieve_datasetlist", "retrieve_dataset"),
    *("verify_dataset", "create_test_dataset", "end_to_end_test", "reconcile"),
)
_PAGE: Final = 200
_KEY: Final = re.compile(r"(?:archive|retrieve)/.+/([0-9]+)")
_REMEMBERED: Final = timedelta(days=2)
_LIVE: Final = (
    StateType.SCHEDULED,
    StateType.PENDING,
    StateType.RUNNING,
    StateType.PAUSED,
    StateType.CANCELLING,
)
_FATES: Final[dict[StateType, RunFate]] = {
    StateType.CANCELLED: "cancelled",
    StateType.CRASHED: "crashed",
    StateType.FAILED: "failed",
    StateType.COMPLETED: "completed",
}


def fate(run: FlowRun) -> RunFate:
    """How a run stands."""
    return _FATES.get(run.state_type, "live") if run.state_type is not None else "live"


async def live_jobs(client: PrefectClient, kind: JobKind) -> set[str]:
    """Ids of the jobs that a run is scheduled for or working on."""
    return {
        str(run.parameters.get("job_id")) async for run in _runs_of(client, [_job_flow(kind)], _LIVE) if _is_real(run)
    }


async def runs_of_job(client: PrefectClient, kind: JobKind, job_id: str) -> list[FlowRun]:
    """The runs of one job that were started for it by name, oldest first.

    One for some of its datasets is among them only as long as it lives: it leaves the job as it is.
    """
    runs = [
        run
        async for run in _runs_of(client, [_job_flow(kind)], name_like=job_id)
        if run.parameters.get("job_id") == job_id
        and _is_real(run)
        and not (run.parameters.get("dataset_ids") and fate(run) != "live")
    ]
    return sorted(runs, key=_created)


def since_asked(runs: Sequence[FlowRun]) -> Sequence[FlowRun]:
    """The runs of a job that count as its tries: from the last one on that somebody started for it by hand, if any."""
    asked = [index for index, run in enumerate(runs) if _number(run) is None]
    return runs[asked[-1] :] if asked else runs


def next_number(runs: Sequence[FlowRun]) -> int:
    """The number of the next run of a job, which none of its runs has: to ask for one that is there gives that one."""
    return 1 + max((_number(run) or 0 for run in runs), default=0)


class HandRun(NamedTuple):
    """A run of datasets for their own sake: of one, or of some of a job's."""

    run: FlowRun
    dataset_ids: tuple[str, ...]


async def hand_runs(client: PrefectClient, kind: JobKind, *, live: bool) -> list[HandRun]:
    """Those that live, or those that ended badly in the last two days, oldest first."""
    states = _LIVE if live else (StateType.FAILED, StateType.CRASHED, StateType.CANCELLED)
    since = None if live else datetime.now(UTC) - _REMEMBERED
    found = []
    async for run in _runs_of(client, [_job_flow(kind), f"{kind}_dataset"], states, ended_after=since):
        one, several = run.parameters.get("dataset_id"), run.parameters.get("dataset_ids")
        if isinstance(one, str) and run.parent_task_run_id is None:
            several = [one]
        if isinstance(several, list) and _is_real(run):
            found.append(HandRun(run, tuple(str(dataset_id) for dataset_id in several)))
    return sorted(found, key=lambda item: _created(item.run))


async def start_run(
    client: PrefectClient, kind: JobKind, job_id: str, number: int, last: FlowRun | None = None
) -> FlowRun:
    """Starts a run of the job's deployment; of one number there is one run, however often this is called.

    ``last``: the run that it takes the place of, whose parameters it gets.

    Raises:
        ConfigError: the deployment does not exist.
    """
    try:
        deployment = await client.read_deployment_by_name(DEPLOYMENTS[kind])
    except ObjectNotFound as error:
        raise ConfigError(DEPLOYMENTS[kind], None, "a deployment; `python -m flows.deploy` creates it") from error
    return await client.create_flow_run_from_deployment(
        deployment.id,
        parameters=(last.parameters if last else {}) | {"job_id": job_id},
        name=f"{kind} job {job_id}",
        idempotency_key=f"{kind}/{job_id}/{number}",
    )


async def bury_silent_runs(client: PrefectClient, now: datetime | None = None) -> list[FlowRun]:
    """Declares runs crashed whose heartbeats have stopped, or that never sent any for a long time.

    Runs that are being cancelled are Prefect's own business: it ends them after some minutes. Those of all flows count:
    as long as one seems to work it has its place in the work pool, and no lost slot is given back.
    """
    now = now or datetime.now(UTC)
    buried = []
    unended = _runs_of(client, _FLOWS, (StateType.PENDING, StateType.RUNNING))
    for run in [run async for run in unended]:  # whole, as those that are buried are missing from the pages after them
        heard = await _last_heartbeat(client, run)
        since, bound_s = (heard, SILENCE_S) if heard else (run.state.timestamp if run.state else now, NEVER_HEARD_S)
        silent_s = (now - since).total_seconds()
        if silent_s > bound_s:
            message = f"no heartbeat for {silent_s:.0f} s: its process is gone"
            await client.set_flow_run_state(run.id, Crashed(message=message), force=True)
            buried.append(run)
    return buried


async def _last_heartbeat(client: PrefectClient, run: FlowRun) -> datetime | None:
    page = await client.read_events(
        EventFilter(
            occurred=EventOccurredFilter.model_validate({"since": datetime.now(UTC) - timedelta(days=7)}),
            event=EventNameFilter(name=["prefect.flow-run.heartbeat"]),
            resource=EventResourceFilter(id=[f"prefect.flow-run.{run.id}"]),
        ),
        limit=1,
    )
    return page.events[0].occurred if page.events else None


async def _runs_of(
    client: PrefectClient,
    flow_names: Sequence[str],
    states: Sequence[StateType] = (),
    name_like: str = "",
    ended_after: datetime | None = None,
) -> AsyncIterator[FlowRun]:
    wanted_flows = FlowFilter(name=FlowFilterName(any_=list(flow_names)))
    wanted = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states))) if states else None,
        name=FlowRunFilterName(like_=name_like) if name_like else None,
        end_time=FlowRunFilterEndTime.model_validate({"after_": ended_after}) if ended_after else None,
    )
    offset = 0
    while True:
        page = await client.read_flow_runs(
            flow_filter=wanted_flows,
            flow_run_filter=wanted,
            sort=FlowRunSort.ID_DESC,
            limit=_PAGE,
            offset=offset,
        )
        for run in page:
            yield run
        if len(page) < _PAGE:
            return
        offset += _PAGE


def _job_flow(kind: JobKind) -> str:
    return DEPLOYMENTS[kind].partition("/")[0]


def _is_real(run: FlowRun) -> bool:
    return not run.parameters.get("dry_run")


def _number(run: FlowRun) -> int | None:
    """Which of its job's runs it is; None: it was started by hand, not by trigger, hook or reconciler."""
    match = _KEY.fullmatch(run.idempotency_key or "")
    return int(match[1]) if match else None


def _created(run: FlowRun) -> datetime:
    return run.created or datetime.min.replace(tzinfo=UTC)
