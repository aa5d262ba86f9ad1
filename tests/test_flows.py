"""Jobs of the catalogue through the flows, in this process: a real Prefect server, S3, the catalogue, an LTS folder."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.engines import expect_same_files
from tests.flow_world import FlowWorld, until
from tests.lts_mounts import small_mount

pytestmark = [
    pytest.mark.anyio,
    # Prefect leaves the connections of its threads to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

PID, LOST = "20.500.11935/first", "20.500.11935/lost"


async def test_an_archive_job_ends_with_its_datasets_on_the_lts_registered_and_released(flow_world: FlowWorld) -> None:
    from flows.archive import archive_datasetlist

    files = flow_world.add_dataset(PID, 12)
    job_id = flow_world.control.seed_job("archive", [PID])

    state = await archive_datasetlist(job_id, return_state=True)

    assert state.is_completed(), state.message
    expect_same_files(flow_world.lts, files, PID)
    assert flow_world.control.lifecycle_values(PID) == ["started", "datasetOnArchiveDisk"]
    assert flow_world.job(job_id)["statusCode"] == "finishedSuccessful"
    assert flow_world.source_keys(PID) == []
    assert set(flow_world.taken_slots().values()) == {0}


async def test_a_retrieval_of_some_files_brings_those_and_tells_their_links(flow_world: FlowWorld) -> None:
    from flows.archive import archive_datasetlist
    from flows.retrieve import retrieve_datasetlist

    files = flow_world.add_dataset(PID, 12)
    wanted = sorted(files)[3:5]
    await archive_datasetlist(flow_world.control.seed_job("archive", [PID]))
    job_id = flow_world.control.seed_job("retrieve", {PID: wanted})

    state = await retrieve_datasetlist(job_id, return_state=True)

    assert state.is_completed(), state.message
    rows = flow_world.job(job_id)["jobResultObject"]["result"]
    async with httpx.AsyncClient(timeout=30) as client:
        found = {row["name"]: (await client.get(row["url"])).content for row in rows}
    assert found == {path.rpartition("/")[2]: files[path] for path in wanted}
    lifecycle = flow_world.control.lifecycle(PID)
    assert (lifecycle["retrieveStatusMessage"], lifecycle["retrieveIntegrityCheck"]) == ("datasetRetrieved", True)
    assert lifecycle["retrievable"] is True


async def test_a_dry_run_writes_nothing_anywhere(flow_world: FlowWorld) -> None:
    from flows.archive import archive_datasetlist
    from flows.create_test_dataset import create_test_dataset
    from flows.retrieve import retrieve_datasetlist

    flow_world.add_dataset(PID, 3)
    archive_job = flow_world.control.seed_job("archive", [PID])
    retrieve_job = flow_world.control.seed_job("retrieve", [PID])

    planned = await archive_datasetlist(archive_job, dry_run=True, return_state=True)
    looked_up = await retrieve_datasetlist(retrieve_job, dry_run=True, return_state=True)
    created = await create_test_dataset(dry_run=True, return_state=True)

    assert planned.is_completed()
    assert looked_up.is_failed()  # it is not archived yet
    assert created.is_completed()
    assert flow_world.control.history("lifecycle") == []
    for job_id in (archive_job, retrieve_job):
        assert flow_world.control.job_statuses(job_id) == ["jobSubmitted"]
    assert [path for path in flow_world.lts.rglob("*") if path.suffix in {".tar", ".json", ".part"}] == []
    assert len(flow_world.source_keys(PID)) == 3


async def test_a_dry_run_of_a_job_says_which_datasets_would_fail(flow_world: FlowWorld) -> None:
    from flows.archive import archive_datasetlist
    from flows.retrieve import retrieve_datasetlist

    files = flow_world.add_dataset(PID, 3)
    flow_world.control.seed_dataset(LOST, {"lost.tif": 5})
    job_id = flow_world.control.seed_job("archive", [PID, LOST])
    planned = await archive_datasetlist(job_id, dry_run=True, return_state=True)
    assert planned.is_failed()
    assert "1 dataset(s) would fail" in (planned.message or "")
    assert "lost.tif" in (planned.message or "")

    await archive_datasetlist(flow_world.control.seed_job("archive", [PID]))
    first = min(files)
    found = flow_world.control.seed_job("retrieve", {PID: [first]})
    looked_up = await retrieve_datasetlist(found, dry_run=True, return_state=True)
    assert looked_up.message == f"{PID}: 1 file(s), {len(files[first]):,} bytes on the LTS; nothing written"
    unknown = flow_world.control.seed_job("retrieve", {PID: [first, "no/such.tif"], LOST: []})
    looked_up = await retrieve_datasetlist(unknown, dry_run=True, return_state=True)
    assert looked_up.is_failed()
    assert "2 dataset(s) would fail" in (looked_up.message or "")
    assert "no/such.tif" in (looked_up.message or "")


async def test_a_dataset_that_no_share_could_hold_is_refused_once_and_at_once(
    flow_world: FlowWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterFlowRunId

    from flows.archive import archive_datasetlist

    flow_world.add_dataset(PID, {"frame.tif": b"x" * 700_000})
    job_id = flow_world.control.seed_job("archive", [PID])
    monkeypatch.setenv("LTS_FREE_SPACE_PERCENTAGE", "99")

    with small_mount(tmp_path / "small") as lts:
        monkeypatch.setenv("LTS_STORAGE_ROOT", str(lts))
        state = await archive_datasetlist(job_id, return_state=True)

    assert state.is_failed()
    assert "not enough space" in flow_world.job(job_id)["statusMessage"]
    assert flow_world.control.lifecycle(PID)["archiveStatusMessage"] == "scheduleArchiveJobFailed"
    (flow_run,) = flow_world.flow_runs("archive 20.500")

    def waits() -> int:
        with flow_world.client() as client:
            ours = TaskRunFilter(flow_run_id=TaskRunFilterFlowRunId(any_=[flow_run.id]))
            return sum(run.name.startswith("wait-for-space") for run in client.read_task_runs(task_run_filter=ours))

    assert until(waits, what="the task run, which the server writes late") == 1


async def test_a_created_test_dataset_archives_and_verifies(flow_world: FlowWorld) -> None:
    from flows.archive import archive_dataset
    from flows.create_test_dataset import create_test_dataset
    from flows.verify import verify_dataset

    await create_test_dataset(PID, file_count=4, file_kib=300)
    archived = await archive_dataset(PID, return_state=True)
    verified = await verify_dataset(PID, return_state=True)

    assert archived.is_completed(), archived.message
    listed = flow_world.control.state.datasets[PID]
    assert listed["numberOfFiles"] == 4
    assert 3 * 300 << 10 <= listed["size"] < 4 * 300 << 10  # of the four one is empty
    assert verified.message == "1 datablock(s) agree with their manifests"


@pytest.mark.slow
async def test_a_missing_limit_stops_the_run_before_anything_moves(flow_world: FlowWorld) -> None:
    from flows.archive import archive_datasetlist

    flow_world.add_dataset(PID, 1)
    job_id = flow_world.control.seed_job("archive", [PID])
    with flow_world.client() as client:
        client.delete_concurrency_limit_by_tag("move-to-lts")

    state = await archive_datasetlist(job_id, return_state=True)

    assert state.is_failed()
    assert "MOVE_TO_LTS_LIMIT" in (state.message or "")
    assert "python -m flows.configure" in (state.message or "")
