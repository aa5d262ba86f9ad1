"""Jobs of the catalogue through the flows, in this process: a real Prefect server, S3, the catalogue, an LTS folder."""

from __future__ import annotations

import pytest

from tests.engines import expect_same_files
from tests.flow_world import FlowWorld

pytestmark = [
    pytest.mark.anyio,
    # Prefect leaves the connections of its threads to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

PID = "20.500.11935/first"


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
