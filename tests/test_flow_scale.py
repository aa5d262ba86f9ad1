"""Numbers beyond every page and default limit: nothing of a dataset, of the catalogue or of a job is cut off.

25,000 entries in 150 origdatablocks are 5,100 files, which are objects, and 19,900 directories, which are not.
"""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

import anyio
import msgspec
import pytest

from mover.engine import Engine
from mover.errors import UserError
from mover.jobs import JobRunner
from mover.jobs_lifecycle import is_finished
from mover.jobs_result import job_result, retrieved_outcome
from mover.model import raw_object_key
from mover.policies.reconciliation import ATTEMPTS
from mover.reports import RetrieveReport
from mover.scicat import SciCat
from mover.settings import load_settings
from mover.wiring import engine_config, scicat_access
from tests.datasets import upload
from tests.engines import expect_same_files
from tests.flow_watch import flow_processes
from tests.flow_world import FlowWorld, until
from tests.scicat_fake.seeding import SeedFile
from tests.servers import s3_client

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    # Prefect leaves the connections of its threads to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

PID = "20.500.11935/large"
_ENTRIES, _ORIGDATABLOCKS = 25_000, 150
_FILES, _FILE_BYTES = 5_100, 100
_DATABLOCKS = 150
_DATASETS, _MOST_OF_A_JOB = 101, 100


def _seed(world: FlowWorld) -> dict[str, bytes]:
    """The dataset in the catalogue and in the landing zone; files and directories are mixed in all origdatablocks."""
    files = {f"{index:05}/scan.dat": f"{index:0{_FILE_BYTES}}".encode() for index in range(_FILES)}
    entries = [SeedFile(path, _FILE_BYTES) for path in files]
    entries += [SeedFile(f"{index:05}/empty", 4096, kind="directory") for index in range(_ENTRIES - _FILES)]
    entries.sort(key=lambda entry: entry.path)
    per_block = -(-_ENTRIES // _ORIGDATABLOCKS)
    world.control.seed_dataset(PID, entries, files_per_block=per_block, directories=False)
    upload(world.s3, world.landing_zone, files, PID)
    return files


@asynccontextmanager
async def _runner(world: FlowWorld) -> AsyncIterator[tuple[Engine, JobRunner]]:
    settings = load_settings(environ=world.settings)
    config = msgspec.structs.replace(
        engine_config(settings), target_bytes=_FILES // _DATABLOCKS * _FILE_BYTES, move_to_lts_limit=4
    )
    async with (
        SciCat.open(scicat_access(settings)) as catalogue,
        Engine.open(config, catalogue=catalogue) as engine,
    ):
        yield engine, JobRunner(engine, catalogue)


async def _there_and_back(world: FlowWorld, lost: str, body: bytes) -> RetrieveReport:
    """Archives and retrieves the dataset; while one file is missing, that is noticed."""
    key = raw_object_key(PID, lost)
    async with _runner(world) as (engine, jobs):
        with s3_client(world.s3) as client:
            client.delete_object(Bucket=world.landing_zone, Key=key)
            with pytest.raises(UserError, match=lost):
                await engine.plan(PID)
            client.put_object(Bucket=world.landing_zone, Key=key, Body=body)
        archived = await jobs.archive(PID, release_source=True)
        assert archived.outcome.state == "done", archived.outcome.message
        assert archived.outcome.details["files"] == _FILES
        (dataset,) = await jobs.read(world.control.seed_job("retrieve", [PID]), "retrieve")
        retrieved = await jobs.retrieve(dataset)
        assert retrieved.report is not None, retrieved.outcome.message
        return retrieved.report


def test_a_dataset_of_25_000_entries_and_150_datablocks_is_compared_registered_and_brought_back_whole(
    flow_world: FlowWorld,
) -> None:
    files = _seed(flow_world)
    blocks = flow_world.control.state.orig_datablocks[PID].values()
    assert len(blocks) == _ORIGDATABLOCKS
    assert sum(len(block["dataFileList"]) for block in blocks) == _ENTRIES
    last = max(files)

    # Not in the tests' own loop, whose checks cost as much as the work.
    report = anyio.run(_there_and_back, flow_world, last, files[last])

    registered = flow_world.control.datablocks(PID)
    assert len({block["archiveId"] for block in registered}) == len(registered) == _DATABLOCKS
    assert {entry["path"] for block in registered for entry in block["dataFileList"]} == files.keys()
    assert flow_world.control.lifecycle(PID)["archiveStatusMessage"] == "datasetOnArchiveDisk"
    assert flow_world.control.lifecycle(PID)["retrieveStatusMessage"] == "datasetRetrieved"
    expect_same_files(flow_world.lts, files, PID)
    result = job_result([retrieved_outcome(report)], [report])
    assert {row["archiveId"] for row in result["result"]} == {block["archiveId"] for block in registered}
    assert result["linksLeftOut"] == 0


def _all_ended(processes: Sequence[subprocess.Popen[bytes]]) -> bool:
    return all(process.poll() is not None for process in processes)


def test_101_datasets_of_two_jobs_are_all_archived_by_their_flow_runs(flow_world: FlowWorld) -> None:
    pids = [f"20.500.11935/{number:03}" for number in range(_DATASETS)]
    for pid in pids:
        flow_world.add_dataset(pid, 1)
    jobs = [flow_world.control.seed_job("archive", part) for part in (pids[:_MOST_OF_A_JOB], pids[_MOST_OF_A_JOB:])]

    for _ in range(ATTEMPTS):  # as the reconciler does when a run fails, with Prefect's database under two at a time
        open_jobs = [job_id for job_id in jobs if not is_finished(flow_world.job(job_id)["statusCode"])]
        with flow_processes(flow_world, "archive", open_jobs) as processes:
            until(partial(_all_ended, processes), 1000, "the ends of the runs")

    assert {pid: flow_world.control.lifecycle_values(pid)[-1] for pid in pids} == dict.fromkeys(
        pids, "datasetOnArchiveDisk"
    )
    told = [flow_world.job(job_id) for job_id in jobs]
    assert [job["statusCode"] for job in told] == ["finishedSuccessful"] * 2
    results = [row["datasetId"] for job in told for row in job["jobResultObject"]["datasets"]]
    assert results == pids
    completed = {run.name for run in flow_world.flow_runs("archive 20.500.11935/") if run.state_name == "Completed"}
    assert {f"archive {pid}" for pid in pids} <= completed
