"""Runs and slots that nobody ends, on a real server: found by what it knows of them, left alone while they may live."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import anyio
import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.events.clients import get_events_client
from prefect.events.schemas.events import Event
from prefect.states import Pending, Running

from tests.flow_world import FlowWorld

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    # Prefect leaves the connections of its threads to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
async def client(flow_world: FlowWorld) -> AsyncIterator[PrefectClient]:
    del flow_world  # its server and limits
    async with get_client() as client:
        yield client
        for run in await client.read_flow_runs():
            if run.state_type in {StateType.PENDING, StateType.RUNNING}:
                await client.delete_flow_run(run.id)


async def _run(client: PrefectClient, *, running: bool) -> FlowRun:
    from flows.archive import archive_datasetlist

    return await client.create_flow_run(
        archive_datasetlist, parameters={"job_id": str(uuid.uuid4())}, state=Running() if running else Pending()
    )


async def _beat(run: FlowRun) -> None:
    """A heartbeat of the run, and the time until the server has it."""
    from flows.runs import _last_heartbeat

    event = {
        "occurred": datetime.now(UTC),
        "event": "prefect.flow-run.heartbeat",
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run.id}"},
        "id": uuid.uuid4(),
    }
    async with get_events_client() as events, get_client() as client:
        await events.emit(Event.model_validate(event))
        with anyio.fail_after(45):
            while await _last_heartbeat(client, run) is None:  # noqa: ASYNC110 - it is the server that knows
                await anyio.sleep(0.1)


async def _state(client: PrefectClient, run: FlowRun) -> StateType | None:
    return (await client.read_flow_run(run.id)).state_type


@pytest.mark.slow
async def test_a_run_whose_heartbeats_stopped_is_declared_crashed_and_one_that_beats_is_not(
    client: PrefectClient,
) -> None:
    from flows.runs import SILENCE_S, bury_silent_runs

    run = await _run(client, running=True)
    await _beat(run)
    now = datetime.now(UTC)
    await bury_silent_runs(client, now + timedelta(seconds=SILENCE_S / 2))
    assert await _state(client, run) is StateType.RUNNING
    buried = await bury_silent_runs(client, now + timedelta(seconds=SILENCE_S + 1))
    assert run.id in [other.id for other in buried]  # beside those that killed processes of other tests left
    assert await _state(client, run) is StateType.CRASHED


@pytest.mark.parametrize("running", [False, True])
async def test_a_run_that_was_never_heard_of_gets_time_to_begin_and_then_counts_as_dead(
    client: PrefectClient, *, running: bool
) -> None:
    from flows.runs import NEVER_HEARD_S, bury_silent_runs

    run = await _run(client, running=running)
    now = datetime.now(UTC)
    await bury_silent_runs(client, now + timedelta(seconds=NEVER_HEARD_S - 60))
    assert await _state(client, run) is (StateType.RUNNING if running else StateType.PENDING)
    await bury_silent_runs(client, now + timedelta(seconds=NEVER_HEARD_S + 60))
    assert await _state(client, run) is StateType.CRASHED


@pytest.mark.slow
async def test_slots_are_freed_only_when_nothing_has_run_for_longer_than_a_lease_lasts(
    client: PrefectClient, flow_world: FlowWorld
) -> None:
    from flows.reconciliation import free_slots

    await client.increment_concurrency_slots(["tag:move-to-lts"], 1, "concurrency")  # without a lease: it never ends
    later = datetime.now(UTC) + timedelta(minutes=10)
    runs = [await _run(client, running=True) for _ in range(2)]
    assert await free_slots(client, dry_run=False, now=later) == []
    for run in runs:
        await client.delete_flow_run(run.id)
    assert len(await free_slots(client, dry_run=True, now=later)) == 1
    assert flow_world.taken_slots()["MOVE_TO_LTS_LIMIT"] == 1
    (action,) = await free_slots(client, dry_run=False, now=later)
    assert action.target == "tag:move-to-lts"
    assert set(flow_world.taken_slots().values()) == {0}
