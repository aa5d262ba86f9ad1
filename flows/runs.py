"""The flow runs of jobs as Prefect knows them: found by job, started once per attempt, declared dead when they are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
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
    "bury_silent_runs",
    "fate",
    "live_jobs",
    "runs_of_job",
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

_PAGE: Final = 200
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
    return {str(run.parameters.get("job_id")) async for run in _runs_of(client, kind, _LIVE) if _is_real(run)}


async def runs_of_job(client: PrefectClient, kind: JobKind, job_id: str) -> list[FlowRun]:
    """The runs of one job that were started for it by name, oldest first.

    One that completed for some of its datasets is not among them: it leaves the job as it is.
    """
    runs = [
        run
        async for run in _runs_of(client, kind, name_like=job_id)
        if run.parameters.get("job_id") == job_id
        and _is_real(run)
        and not (run.parameters.get("dataset_ids") and fate(run) == "completed")
    ]
    return sorted(runs, key=_created)


async def start_run(
    client: PrefectClient, kind: JobKind, job_id: str, attempt: int, last: FlowRun | None = None
) -> FlowRun:
    """Starts a run of the job's deployment; for one attempt there is one run, however often this is called.

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
        idempotency_key=f"{kind}/{job_id}/{attempt}",
    )


async def bury_silent_runs(client: PrefectClient, kind: JobKind, now: datetime | None = None) -> list[FlowRun]:
    """Declares runs crashed whose heartbeats have stopped, or that never sent any for a long time.

    Runs that are being cancelled are Prefect's own business: it ends them after some minutes. Those of single datasets
    count as well: they die with the run of their job, and as long as one seems to work no lost slot is given back.
    """
    now = now or datetime.now(UTC)
    buried = []
    flow_names = [DEPLOYMENTS[kind].partition("/")[0], f"{kind}_dataset"]
    unended = _runs_of(client, kind, (StateType.PENDING, StateType.RUNNING), flow_names=flow_names)
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
    kind: JobKind,
    states: Sequence[StateType] = (),
    name_like: str = "",
    flow_names: Sequence[str] = (),
) -> AsyncIterator[FlowRun]:
    wanted_flows = FlowFilter(name=FlowFilterName(any_=list(flow_names) or [DEPLOYMENTS[kind].partition("/")[0]]))
    wanted = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states))) if states else None,
        name=FlowRunFilterName(like_=name_like) if name_like else None,
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


def _is_real(run: FlowRun) -> bool:
    return not run.parameters.get("dry_run")


def _created(run: FlowRun) -> datetime:
    return run.created or datetime.min.replace(tzinfo=UTC)
