"""Flows that delegate to a daemon: a real Prefect server, catalogue, S3 and a daemon; nothing is moved in the run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import httpx
import pytest

from mover.daemon_jobs import JobService
from mover.jobs_settle import settle_job
from mover.scicat import SciCat
from mover.settings import load_settings
from mover.wiring import engine_config, scicat_access
from tests.engines import expect_same_files
from tests.flow_world import FlowWorld
from tests.http_daemons import OPERATOR, TOKENS, serve
from tests.job_services import ended, open_service, order

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    # Prefect leaves the connections of its threads to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

PID, ABSENT = "20.500.11935/first", "20.500.11935/absent"


@pytest.fixture
async def daemon(flow_world: FlowWorld, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[JobService]:
    """The daemon of the world; flows find it, and no LTS of their own."""
    settings = load_settings(environ=flow_world.settings)
    token_file = flow_world.scratch.parent / "token"
    token_file.write_text(OPERATOR)
    token_file.chmod(0o600)
    async with (
        SciCat.open(scicat_access(settings)) as catalogue,
        open_service(engine_config(settings), catalogue=catalogue) as service,
        serve(service, TOKENS) as served,
    ):
        monkeypatch.setenv("MOVER_URL", served.url)
        monkeypatch.setenv("MOVER_TOKEN_FILE", str(token_file))
        monkeypatch.setenv("LTS_STORAGE_ROOT", str(flow_world.lts.parent / "not mounted here"))
        yield service


async def _kinds(service: JobService) -> Sequence[tuple[str, str]]:
    return [(job.kind, job.state) for job in (await service.jobs()).jobs][::-1]


async def test_jobs_go_there_and_back_by_the_daemon_with_the_catalogue_told_by_the_run(
    flow_world: FlowWorld, daemon: JobService
) -> None:
    from flows.archive import archive_datasetlist
    from flows.retrieve import retrieve_datasetlist
    from flows.verify import verify_dataset

    files = flow_world.add_dataset(PID, 12)
    job_id = flow_world.control.seed_job("archive", [PID])
    planned = await archive_datasetlist(job_id, dry_run=True, return_state=True)
    state = await archive_datasetlist(job_id, return_state=True)

    assert planned.is_completed(), planned.message
    assert state.is_completed(), state.message
    expect_same_files(flow_world.lts, files, PID)
    assert flow_world.control.lifecycle_values(PID) == ["started", "datasetOnArchiveDisk"]
    assert flow_world.job(job_id)["statusCode"] == "finishedSuccessful"
    assert flow_world.source_keys(PID) == []

    assert (await verify_dataset(PID, return_state=True)).is_completed()
    wanted = sorted(files)[3:5]
    back = flow_world.control.seed_job("retrieve", {PID: wanted})
    state = await retrieve_datasetlist(back, return_state=True)
    assert state.is_completed(), state.message
    rows = flow_world.job(back)["jobResultObject"]["result"]
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
        found = {row["name"]: (await client.get(row["url"])).content for row in rows}
    assert found == {path.rpartition("/")[2]: files[path] for path in wanted}

    assert await _kinds(daemon) == [("plan", "done"), ("archive", "done"), ("verify", "done"), ("retrieve", "done")]
    assert set(flow_world.taken_slots().values()) == {0}
    tasks = {run.name.split()[0] for run in flow_world.flow_runs()}
    assert tasks == {"archive", "verify", "retrieve"}


async def test_a_job_whose_runs_are_gone_is_settled_where_the_lts_is(flow_world: FlowWorld, daemon: JobService) -> None:
    from flows.settling import open_settling

    flow_world.add_dataset(PID, 4)
    await ended(daemon, (await daemon.submit(order(PID), owner="test"))[0].id)  # and the run told nobody
    flow_world.add_dataset(ABSENT, 4)
    for dataset_id in (PID, ABSENT):
        lifecycle = flow_world.control.state.datasets[dataset_id]["datasetlifecycle"]
        lifecycle.update(archivable=False, retrievable=False, archiveStatusMessage="started")
    job_id = flow_world.control.seed_job("archive", [PID, ABSENT], status="inProgress")

    access = scicat_access(load_settings(environ=flow_world.settings))
    async with SciCat.open(access) as catalogue, open_settling(catalogue) as open_engine:
        job = await catalogue.job(job_id)
        code = await settle_job(open_engine, catalogue, job, "archive", "system-error", "its runs were killed")

    assert code == "finishedUnsuccessful"
    assert flow_world.control.lifecycle(PID)["retrievable"] is True
    assert flow_world.control.lifecycle(ABSENT)["archiveStatusMessage"] == "scheduleArchiveJobFailed"
    assert await _kinds(daemon) == [
        ("archive", "done"),
        ("verify", "done"),
        ("archive", "done"),
        ("verify", "failed"),
    ]


async def test_what_the_daemon_has_is_looked_up_without_writing(flow_world: FlowWorld, daemon: JobService) -> None:
    from flows.retrieve import retrieve_datasetlist

    flow_world.add_dataset(PID, 4)
    await ended(daemon, (await daemon.submit(order(PID), owner="test"))[0].id)
    job_id = flow_world.control.seed_job("retrieve", [PID])
    state = await retrieve_datasetlist(job_id, dry_run=True, return_state=True)
    assert state.is_completed(), state.message
    assert "1 datablock(s)" in (state.message or "")
    assert flow_world.control.job_statuses(job_id) == ["jobSubmitted"]


async def test_a_daemon_without_a_catalogue_archives_nothing_for_a_job_of_the_catalogue(
    flow_world: FlowWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.archive import archive_datasetlist

    flow_world.add_dataset(PID, 4)
    job_id = flow_world.control.seed_job("archive", [PID])
    config = engine_config(load_settings(environ=flow_world.settings))
    async with open_service(config) as service, serve(service, None) as served:
        monkeypatch.setenv("MOVER_URL", served.url)
        state = await archive_datasetlist(job_id, return_state=True)

    assert state.is_failed()
    assert "SCICAT_ENDPOINT" in flow_world.job(job_id)["statusMessage"]
    assert flow_world.control.lifecycle(PID)["archiveStatusMessage"] == "scheduleArchiveJobFailed"
    assert len(flow_world.source_keys(PID)) == 4


async def test_a_dataset_that_fails_in_the_daemon_is_told_as_the_owners_error(
    flow_world: FlowWorld, daemon: JobService
) -> None:
    from flows.archive import archive_datasetlist

    flow_world.control.seed_dataset(ABSENT, {"a": 5})
    job_id = flow_world.control.seed_job("archive", [ABSENT])
    state = await archive_datasetlist(job_id, return_state=True)
    assert state.name == "CompletedWithDatasetErrors"
    assert flow_world.job(job_id)["statusCode"] == "finishedWithDatasetErrors"
    told = flow_world.control.lifecycle(ABSENT)
    assert told["archiveStatusMessage"] == "missingFilesError"
    assert told["archiveReturnMessage"]["missingFiles"] == ["a"]
    assert await _kinds(daemon) == [("archive", "failed")]
