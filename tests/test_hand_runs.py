"""Runs that somebody started by hand, for some datasets of a job or for one alone, and what becomes of them."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prefect import Flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Cancelled, Completed, Crashed, Running

from mover.scicat import SciCat
from mover.settings import load_settings
from mover.wiring import scicat_access
from tests.flow_world import FlowWorld

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    # Prefect leaves the connections of its threads to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Runs:
    """Makes runs as people, triggers and the reconciler make them, in the state that they came to."""

    def __init__(self, client: PrefectClient) -> None:
        self.client = client
        self._made: list[uuid.UUID] = []

    async def make(self, flow: Flow[Any, Any], state: State[Any], number: int | None = None, **given: Any) -> FlowRun:  # noqa: ANN401 - parameters
        """``number``: of a run that hook, reconciler or trigger started; None: by hand."""
        if number is None:
            run = await self.client.create_flow_run(flow, parameters=given, name=f"by hand {given}", state=state)
        else:
            body = {
                "flow_id": str(await self.client.create_flow(flow)),
                "parameters": given,
                "name": f"archive job {given['job_id']}",
                "idempotency_key": f"archive/{given['job_id']}/{number}",
            }
            answer = await self.client._client.post("/flow_runs/", json=body)  # noqa: SLF001 - the key has no other way
            run = FlowRun.model_validate(answer.json())
            await self.client.set_flow_run_state(run.id, state, force=True)
        self._made.append(run.id)
        return run

    async def clear(self) -> None:
        for run_id in self._made:
            await self.client.delete_flow_run(run_id)


@pytest.fixture
async def runs(flow_world: FlowWorld) -> AsyncIterator[Runs]:
    del flow_world  # its server and limits
    async with get_client() as client:
        made = Runs(client)
        yield made
        await made.clear()


@pytest.fixture
def dataset_id(flow_world: FlowWorld) -> str:
    """A dataset that looks as if a run worked on it."""
    dataset_id = f"20.500.11935/{uuid.uuid4()}"
    flow_world.add_dataset(dataset_id, 2)
    lifecycle = flow_world.control.state.datasets[dataset_id]["datasetlifecycle"]
    lifecycle.update(archivable=False, retrievable=False, archiveStatusMessage="started")
    return dataset_id


async def _reconcile(world: FlowWorld, client: PrefectClient) -> dict[str, str]:
    """What the reconciler did, by target."""
    from flows.reconciliation import reconcile_all

    async with SciCat.open(scicat_access(load_settings(environ=world.settings))) as catalogue:
        return {action.target: action.what for action in await reconcile_all(client, catalogue)}


@pytest.mark.parametrize(("state", "shown"), [(Crashed(), "scheduleArchiveJobFailed"), (Cancelled(), "datasetCreated")])
@pytest.mark.parametrize("alone", [False, True])
async def test_a_dataset_whose_own_run_is_gone_is_settled_though_no_job_waits_for_it(
    flow_world: FlowWorld, runs: Runs, dataset_id: str, state: State[Any], shown: str, *, alone: bool
) -> None:
    from flows.archive import archive_dataset, archive_datasetlist

    job_id = flow_world.control.seed_job("archive", [dataset_id], status="finishedWithDatasetErrors")
    if alone:
        await runs.make(archive_dataset, state, dataset_id=dataset_id)
    else:
        await runs.make(archive_datasetlist, state, job_id=job_id, dataset_ids=[dataset_id], again=True)

    assert (await _reconcile(flow_world, runs.client))[dataset_id] == "dataset settled"

    lifecycle = flow_world.control.lifecycle(dataset_id)
    assert lifecycle["archiveStatusMessage"] == shown
    assert "by hand" in lifecycle["archiveReturnMessage"]["message"]
    assert flow_world.job(job_id)["statusCode"] == "finishedWithDatasetErrors"
    assert dataset_id not in await _reconcile(flow_world, runs.client)


@pytest.mark.parametrize("held_by", ["an unfinished job", "a run that lives"])
async def test_a_dataset_that_somebody_still_works_for_is_left_to_that(
    flow_world: FlowWorld, runs: Runs, dataset_id: str, held_by: str
) -> None:
    from flows.archive import archive_dataset, archive_datasetlist

    await runs.make(archive_dataset, Crashed(), dataset_id=dataset_id)
    if held_by == "an unfinished job":
        job_id = flow_world.control.seed_job("archive", [dataset_id], status="inProgress")
        await runs.make(archive_datasetlist, Running(), 1, job_id=job_id)
    else:
        await runs.make(archive_dataset, Running(), dataset_id=dataset_id)

    assert dataset_id not in await _reconcile(flow_world, runs.client)
    assert flow_world.control.lifecycle(dataset_id)["archiveStatusMessage"] == "started"


async def test_a_run_for_some_datasets_counts_as_no_try_of_its_job(runs: Runs) -> None:
    from flows.archive import archive_datasetlist
    from flows.runs import next_number, runs_of_job

    job_id = str(uuid.uuid4())
    some = {"job_id": job_id, "dataset_ids": ["20.5/x"]}
    ended: list[State[Any]] = [Completed(), Crashed(), Cancelled()]
    for state in ended:
        run = await runs.client.create_flow_run(archive_datasetlist, parameters=some, name=job_id, state=state)
        runs._made.append(run.id)  # noqa: SLF001
    assert await runs_of_job(runs.client, "archive", job_id) == []
    assert next_number([]) == 1

    live = await runs.client.create_flow_run(archive_datasetlist, parameters=some, name=job_id, state=Running())
    runs._made.append(live.id)  # noqa: SLF001
    assert [run.id for run in await runs_of_job(runs.client, "archive", job_id)] == [live.id]


async def test_tries_count_from_the_last_run_that_somebody_asked_for_and_numbers_never_come_twice(runs: Runs) -> None:
    from flows.archive import archive_datasetlist
    from flows.runs import next_number, runs_of_job, since_asked

    job_id = str(uuid.uuid4())
    await runs.make(archive_datasetlist, Crashed(), 1, job_id=job_id)
    await runs.make(archive_datasetlist, Completed(), 2, job_id=job_id)
    asked = await runs.client.create_flow_run(
        archive_datasetlist, parameters={"job_id": job_id, "again": True}, name=job_id, state=Crashed()
    )
    runs._made.append(asked.id)  # noqa: SLF001
    followed = await runs.make(archive_datasetlist, Crashed(), 3, job_id=job_id)

    found = await runs_of_job(runs.client, "archive", job_id)

    assert len(found) == 4
    assert [run.id for run in since_asked(found)] == [asked.id, followed.id]
    assert next_number(found) == 4
    assert since_asked(found[:2]) == found[:2]


async def test_a_job_that_cannot_be_looked_at_keeps_no_other_from_its_turn(
    flow_world: FlowWorld, runs: Runs, dataset_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.archive import archive_datasetlist

    monkeypatch.setenv("LTS_STORAGE_ROOT", str(flow_world.lts.parent / "not mounted"))
    broken = flow_world.control.seed_job("archive", [dataset_id], status="inProgress")
    await runs.make(archive_datasetlist, Cancelled(), 1, job_id=broken)
    other = flow_world.control.seed_job("archive", [], status="inProgress")
    await runs.make(archive_datasetlist, Cancelled(), 1, job_id=other)

    done = await _reconcile(flow_world, runs.client)

    assert done[broken] == "failed"
    assert done[other] == "job ended"
    monkeypatch.setenv("LTS_STORAGE_ROOT", str(flow_world.lts))
    assert (await _reconcile(flow_world, runs.client))[broken] == "job ended"
    assert flow_world.control.lifecycle(dataset_id)["archiveStatusMessage"] == "datasetCreated"
