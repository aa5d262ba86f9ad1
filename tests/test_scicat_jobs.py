"""Jobs and lifecycles in SciCat: both versions of the API, updates that are stored and answered with an error."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import pytest

from mover.catalogue import CatalogueJob, JobDataset, Lifecycle
from mover.errors import CatalogueAccessError, CatalogueTransientError, DatasetNotFoundError, JobNotFoundError
from mover.scicat import SciCat
from tests.scicat_clients import DATASET, access_to, open_client
from tests.scicat_fake.control import Control
from tests.scicat_fake.server import ScicatServer

pytestmark = pytest.mark.anyio

PATCH_JOB = ("PATCH", r"/jobs/")
PATCH_LIFECYCLE = ("PATCH", r"/datasetlifecycle\Z")


@pytest.fixture
def control(scicat_server: ScicatServer) -> Control:
    scicat_server.control.seed_dataset(DATASET, {"a": 10})
    return scicat_server.control


@pytest.fixture(params=["v4", "v3"])
def either(request: pytest.FixtureRequest, control: Control) -> str:
    """The version of the API that the server has jobs in."""
    control.switches.v3_only = request.param == "v3"
    return str(request.param)


async def listed(client: SciCat, kinds: list[str], status_codes: list[str]) -> list[CatalogueJob]:
    return [job async for job in client.jobs(kinds, status_codes)]


def statuses(control: Control, method: str, path: str) -> list[int]:
    return [request.status for request in control.requests(method, path)]


# ---------------------------------------------------------------------------------------------------------------- jobs
@pytest.mark.usefixtures("either")
async def test_a_job_is_read_in_both_forms(scicat_server: ScicatServer, control: Control) -> None:
    job_id = control.seed_job("retrieve", {DATASET: ["a", "b/c"], "other": []})
    async with open_client(scicat_server) as client:
        job = await client.job(job_id)
    assert (job.job_id, job.kind, job.status_code) == (job_id, "retrieve", "jobSubmitted")
    assert job.datasets == (JobDataset(DATASET, ("a", "b/c")), JobDataset("other", ()))
    assert job.created_at.endswith("Z")


async def test_the_missing_version_is_asked_for_once(scicat_server: ScicatServer, control: Control) -> None:
    control.switches.v3_only = True
    job_id = control.seed_job("archive", [DATASET])
    async with open_client(scicat_server) as client:
        for _ in range(3):
            await client.job(job_id)
        assert (await client.check()).jobs_api == "v3"
    assert len(control.requests("GET", "/api/v4/")) == 1


@pytest.mark.parametrize("prefix", ["/api/v3/", "/api/v4/"])
async def test_either_prefix_serves_for_both_versions(
    scicat_server: ScicatServer, control: Control, prefix: str
) -> None:
    job_id = control.seed_job("archive", [DATASET])
    async with open_client(scicat_server, access_to(scicat_server, api_prefix=prefix)) as client:
        assert (await client.job(job_id)).job_id == job_id
        assert (await client.lifecycle(DATASET)).archivable is True
    assert control.requests("GET", "/api/v4/jobs/")


@pytest.mark.usefixtures("either", "control")
@pytest.mark.parametrize("job_id", ["unknown", "a/b", "..", "", "?x", "a%2Fb"])
async def test_an_unknown_job_is_a_user_error(scicat_server: ScicatServer, job_id: str) -> None:
    async with open_client(scicat_server) as client:
        with pytest.raises(JobNotFoundError):
            await client.job(job_id)
        with pytest.raises(JobNotFoundError):
            await client.update_job(job_id, "inProgress", "running")


@pytest.mark.usefixtures("either")
async def test_no_job_of_many_is_cut_off(scicat_server: ScicatServer, control: Control) -> None:
    wanted = [control.seed_job("archive", [DATASET]) for _ in range(250)]
    wanted += [control.seed_job("retrieve", [DATASET], status="inProgress") for _ in range(3)]
    for _ in range(5):
        control.seed_job("archive", [DATASET], status="finishedSuccessful")
        control.seed_job("public", [DATASET])
    async with open_client(scicat_server) as client:
        found = await listed(client, ["archive", "retrieve"], ["jobSubmitted", "inProgress"])
    assert sorted(job.job_id for job in found) == sorted(wanted)
    assert [job.created_at for job in found] == sorted(job.created_at for job in found)


async def test_an_expired_token_does_not_hide_jobs(scicat_server: ScicatServer, control: Control) -> None:
    control.switches.expired_is_anonymous = True
    job_id = control.seed_job("archive", [DATASET])
    async with open_client(scicat_server) as client:
        await client.job(job_id)
        control.expire_tokens()
        assert [job.job_id for job in await listed(client, ["archive"], ["jobSubmitted"])] == [job_id]
    assert {request.user for request in control.requests("GET", r"/jobs\Z")} == {scicat_server.user}


@pytest.mark.usefixtures("either")
async def test_a_result_is_replaced_or_kept(scicat_server: ScicatServer, control: Control) -> None:
    job_id = control.seed_job("archive", [DATASET])
    async with open_client(scicat_server) as client:
        await client.update_job(job_id, "inProgress", "running", {"first": 1})
        await client.update_job(job_id, "finishedSuccessful", "all is well")
        job = await client.job(job_id)
    assert (job.status_code, job.result) == ("finishedSuccessful", {"first": 1})
    assert control.job_statuses(job_id) == ["jobSubmitted", "inProgress", "finishedSuccessful"]


@pytest.mark.parametrize(
    ("fault", "sent"),
    [
        (lambda control: control.fail_stored_job_update(), [400]),
        (lambda control: control.fail(*PATCH_JOB, 500, body='"Internal server error"', handled=True), [500]),
        (lambda control: control.lose_reply(*PATCH_JOB), [0]),
        (lambda control: control.lose_request(*PATCH_JOB), [0, 200]),
        (lambda control: control.fail(*PATCH_JOB, 503, headers={"Retry-After": "1"}), [503, 200]),
    ],
)
@pytest.mark.usefixtures("either")
async def test_an_update_that_was_stored_is_not_sent_again(
    scicat_server: ScicatServer, control: Control, fault: Callable[[Control], object], sent: list[int]
) -> None:
    job_id = control.seed_job("archive", [DATASET])
    async with open_client(scicat_server) as client:
        await client.job(job_id)
        fault(control)
        await client.update_job(job_id, "inProgress", "running", {"tuple": (1, 2)})
        assert (await client.job(job_id)).result == {"tuple": [1, 2]}
    assert statuses(control, *PATCH_JOB) == sent


async def test_a_stored_update_is_found_although_the_look_up_failed_too(
    scicat_server: ScicatServer, control: Control
) -> None:
    job_id = control.seed_job("archive", [DATASET])
    control.lose_reply(*PATCH_JOB)
    control.fail("GET", "/jobs/", 503)
    async with open_client(scicat_server) as client:
        await client.update_job(job_id, "inProgress", "running")
    assert statuses(control, *PATCH_JOB) == [0]


async def test_a_refused_update_is_an_error(scicat_server: ScicatServer, control: Control) -> None:
    job_id = control.seed_job("archive", [DATASET])
    control.fail(*PATCH_JOB, 400, body='{"message": "statusCode is not allowed here"}', times=-1)
    async with open_client(scicat_server) as client:
        with pytest.raises(CatalogueAccessError, match="not allowed here"):
            await client.update_job(job_id, "odd", "odd")
    assert statuses(control, *PATCH_JOB) == [400]


async def test_a_job_whose_dataset_was_deleted_ends_with_the_server_s_reason(
    scicat_server: ScicatServer, control: Control
) -> None:
    job_id = control.seed_job("archive", [DATASET])
    control.delete_dataset(DATASET)
    async with open_client(scicat_server) as client:
        with pytest.raises(JobNotFoundError, match="Unable to get a dataset"):
            await client.update_job(job_id, "inProgress", "running")
    assert statuses(control, *PATCH_JOB) == [404]


@pytest.mark.parametrize(
    "body", ["<html>", "{}", '{"id": 1}', '{"id": "j", "type": "t", "statusCode": "s", "datasetList": [1]}']
)
async def test_a_job_that_is_none_is_an_error(scicat_server: ScicatServer, control: Control, body: str) -> None:
    control.fail("GET", "/jobs/", 200, body=body)
    async with open_client(scicat_server) as client:
        with pytest.raises(CatalogueAccessError, match="not what SciCat sends"):
            await client.job("j")


# ----------------------------------------------------------------------------------------------------------- lifecycle
CHANGE = Lifecycle(archivable=False, archive_status_message="started", archive_return_message={"text": "ä"})


@pytest.mark.parametrize("merges", [True, False])
async def test_a_change_leaves_the_other_fields(scicat_server: ScicatServer, control: Control, *, merges: bool) -> None:
    control.switches.merge_lifecycle = merges
    control.seed_dataset("full", {"a": 1}, lifecycle={"storageLocation": "here", "retrieveStatusMessage": "kept"})
    before = control.lifecycle("full")
    async with open_client(scicat_server) as client:
        await client.update_lifecycle("full", CHANGE)
        await client.update_lifecycle("full", Lifecycle(retrievable=True))
        found = await client.lifecycle("full")
    after = control.lifecycle("full")
    changed = {"archivable", "retrievable", "archiveStatusMessage", "archiveReturnMessage"}
    assert {name: after.get(name) for name in before if name not in changed} == {
        name: value for name, value in before.items() if name not in changed
    }
    assert (found.archivable, found.retrievable, found.archive_status_message) == (False, True, "started")
    assert found.archive_return_message == {"text": "ä"}
    assert found.retrieve_status_message == "kept"
    assert len(control.requests(*PATCH_LIFECYCLE)) == (2 if merges else 1)


async def test_no_change_is_not_sent(scicat_server: ScicatServer, control: Control) -> None:
    async with open_client(scicat_server) as client:
        await client.update_lifecycle(DATASET, Lifecycle())
    assert not control.requests("PATCH")


@pytest.mark.parametrize("merges", [True, False])
async def test_a_dataset_that_is_gone_is_a_user_error(
    scicat_server: ScicatServer, control: Control, *, merges: bool
) -> None:
    control.switches.merge_lifecycle = merges
    async with open_client(scicat_server) as client:
        with pytest.raises(DatasetNotFoundError):
            await client.lifecycle("gone")
        for _ in range(2):
            with pytest.raises(DatasetNotFoundError):
                await client.update_lifecycle("gone", CHANGE)


async def test_a_lost_change_is_repeated(scicat_server: ScicatServer, control: Control) -> None:
    control.fail(*PATCH_LIFECYCLE, 200, body="{}")  # answered, and undone by another writer
    control.lose_request(*PATCH_LIFECYCLE, after=1)
    async with open_client(scicat_server) as client:
        await client.update_lifecycle(DATASET, CHANGE)
    assert control.lifecycle(DATASET)["archiveStatusMessage"] == "started"


async def test_a_change_that_never_stays_is_an_error(scicat_server: ScicatServer, control: Control) -> None:
    control.fail(*PATCH_LIFECYCLE, 200, body="{}", times=-1)
    async with open_client(scicat_server) as client:
        with pytest.raises(CatalogueTransientError, match=r"archivable, .* did not stay"):
            await client.update_lifecycle(DATASET, CHANGE)
    assert len(control.requests(*PATCH_LIFECYCLE)) == 4


async def test_changes_of_a_dataset_do_not_overlap(scicat_server: ScicatServer, control: Control) -> None:
    control.switches.merge_lifecycle = False
    async with open_client(scicat_server) as client, anyio.create_task_group() as tasks:
        tasks.start_soon(client.update_lifecycle, DATASET, Lifecycle(archivable=False))
        tasks.start_soon(client.update_lifecycle, DATASET, Lifecycle(retrievable=True))
        tasks.start_soon(client.update_lifecycle, DATASET, Lifecycle(archive_status_message="started"))
    stored = control.lifecycle(DATASET)
    assert (stored["archivable"], stored["retrievable"], stored["archiveStatusMessage"]) == (False, True, "started")
