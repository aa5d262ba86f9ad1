"""Every way in which a job can end badly, run for real: processes are killed, the catalogue tells the truth after all.

Each case asserts what the catalogue shows and ever showed, the slots of the limits, what is left behind, and that what
was durable is not fetched again.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial

import anyio
import pytest

from mover.model import raw_object_key
from tests.engines import datablock_file, flip
from tests.faults import Answer, Rule, TrickleReply
from tests.flow_failures import PID, SIBLING, Deployment, deployment, flow_processes, held_move, working
from tests.flow_world import FlowWorld, until
from tests.prefect_servers import PrefectServer, PrefectWorker
from tests.servers import s3_client

__all__ = ["deployment"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    # Prefect leaves the connections of its threads to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

STARTED = (False, False, "started")
ARCHIVED = (False, True, "datasetOnArchiveDisk")
CANCELLED = (True, False, "datasetCreated")
SYSTEM_ERROR = (False, False, "scheduleArchiveJobFailed")
USER_ERROR = (True, False, "missingFilesError")


@pytest.fixture(scope="module")
def worker(prefect_server: PrefectServer) -> Iterator[PrefectWorker]:
    with working(prefect_server) as running:
        yield running


# ------------------------------------------------------------------------------------------------------- killed, ended
@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_is_followed_by_one_that_fetches_only_what_was_not_durable(
    deployment: Deployment, number: signal.Signals
) -> None:
    files = deployment.add_held_dataset()
    job_id = deployment.start_job()
    run = held_move(deployment, job_id)
    deployment.let_go()

    os.kill(flow_processes(run)[-1], number)
    deployment.wait_for_end(job_id)

    assert deployment.states(job_id) == ["Crashed", "Completed"]
    assert deployment.fetched() == ["frames/08.tif"]
    assert deployment.history() == [STARTED, ARCHIVED]
    deployment.expect_archived(job_id, files)
    deployment.expect_slots_back()


@pytest.mark.usefixtures("worker")
def test_a_cancelled_run_leaves_a_dataset_that_can_be_archived_by_a_new_job(deployment: Deployment) -> None:
    files = deployment.add_held_dataset()
    job_id = deployment.start_job()
    run = held_move(deployment, job_id)
    deployment.let_go()

    deployment.cancel(run)
    deployment.wait_for_end(job_id)

    code, message = deployment.status(job_id)
    assert (code, deployment.states(job_id)) == ("finishedUnsuccessful", ["Cancelled"])
    assert "cancelled the run" in message
    assert "cancelled the run" in deployment.told()["message"]
    assert deployment.history() == [STARTED, CANCELLED]
    assert len(deployment.world.source_keys(PID)) == len(files)
    assert deployment.control.datablocks(PID) == []
    deployment.expect_slots_back()

    again = deployment.start_job()
    deployment.wait_for_end(again)
    assert deployment.fetched() == ["frames/08.tif"]
    deployment.expect_archived(again, files)


def test_a_run_that_dies_with_its_worker_is_buried_and_the_reconciler_starts_the_next(
    deployment: Deployment, worker: PrefectWorker
) -> None:
    files = deployment.add_held_dataset()
    job_id = deployment.start_job()
    run = held_move(deployment, job_id)
    deployment.let_go()

    worker.kill()
    for process_id in flow_processes(run):
        os.kill(process_id, signal.SIGKILL)
    assert deployment.reconcile() == []  # it cannot know yet
    until(lambda: deployment.states(job_id) == ["Crashed"], 200, "the automation")
    assert deployment.history() == [STARTED]
    actions = deployment.reconcile()
    worker.start()
    deployment.wait_for_end(job_id)

    assert [(action.what, action.target) for action in actions] == [("run started", job_id)]
    assert deployment.states(job_id) == ["Crashed", "Completed"]
    assert deployment.fetched() == ["frames/08.tif"]
    assert deployment.history() == [STARTED, ARCHIVED]
    deployment.expect_archived(job_id, files)
    deployment.expect_slots_back()


@pytest.mark.usefixtures("worker")
def test_a_restart_of_the_prefect_server_does_not_disturb_a_move(deployment: Deployment) -> None:
    files = deployment.add_held_dataset()
    deployment.proxy.rules[0] = Rule(TrickleReply(4, 15.0), "GET", "frames/08")  # longer than the restart
    job_id = deployment.start_job()
    held_move(deployment, job_id)

    deployment.world.prefect.kill()
    deployment.world.prefect.start()
    assert deployment.world.taken_slots()["MOVE_TO_LTS_LIMIT"] == 1  # the lease outlived the server
    deployment.wait_for_end(job_id)

    assert deployment.states(job_id) == ["Completed"]
    assert deployment.fetches() == dict.fromkeys(files, 1)
    assert deployment.history() == [STARTED, ARCHIVED]
    deployment.expect_archived(job_id, files)
    deployment.expect_slots_back()


@pytest.mark.usefixtures("worker")
def test_after_the_third_failure_the_job_ends_and_its_dataset_waits_for_the_facility(deployment: Deployment) -> None:
    files = deployment.add_held_dataset()
    job_id = deployment.start_job()
    for attempt in range(3):
        run = held_move(deployment, job_id)
        assert len(deployment.runs(job_id)) == attempt + 1
        os.kill(flow_processes(run)[-1], signal.SIGKILL)
        until(lambda seen=attempt: deployment.states(job_id)[seen] == "Crashed", 30, "the crash")  # type: ignore[misc]
    deployment.wait_for_end(job_id)

    code, message = deployment.status(job_id)
    assert (code, deployment.states(job_id)) == ("finishedUnsuccessful", ["Crashed"] * 3)
    assert "failed 3 times" in message
    assert "failed 3 times" in deployment.told()["message"]
    assert deployment.history() == [STARTED, SYSTEM_ERROR]
    assert deployment.control.datablocks(PID) == []
    assert len(deployment.world.source_keys(PID)) == len(files)
    assert deployment.reconcile() == []
    deployment.expect_slots_back()


@pytest.mark.usefixtures("worker")
def test_a_dataset_that_lacks_only_its_registration_is_finished_when_its_job_is_given_up(
    deployment: Deployment,
) -> None:
    files = deployment.world.add_dataset(PID, {f"{index}.bin": bytes([index]) * 900_000 for index in range(3)})
    held = deployment.control.hold("POST", r"/datablocks", times=100)
    held.after = 1  # the first datablock is registered, the second never is
    job_id = deployment.start_job()
    for attempt in range(3):

        def stuck(hits: int = attempt + 1) -> bool:
            return held.hits >= hits and deployment.states(job_id)[-1:] == ["Running"]

        until(stuck, 90, f"attempt {attempt + 1}")
        for process_id in flow_processes(deployment.runs(job_id)[-1]):
            os.kill(process_id, signal.SIGKILL)
    deployment.control.remove(held)
    deployment.wait_for_end(job_id)

    assert deployment.states(job_id) == ["Crashed"] * 3
    assert deployment.status(job_id)[0] == "finishedSuccessful"
    assert deployment.history() == [STARTED, ARCHIVED]
    assert len({block["archiveId"] for block in deployment.control.datablocks(PID)}) == 3
    assert len(deployment.control.datablocks(PID)) == 3
    assert len(deployment.world.source_keys(PID)) == len(files)  # nobody asked for its release again
    deployment.expect_no_leftovers()
    deployment.expect_slots_back()


# -------------------------------------------------------------------------------------------------- catalogue, triggers
@pytest.mark.usefixtures("worker")
def test_a_job_whose_trigger_was_lost_runs_once_and_never_again(deployment: Deployment) -> None:
    from prefect.client.schemas.objects import FlowRun

    files = deployment.world.add_dataset(PID, 5)
    job_id = deployment.control.seed_job("archive", [PID])
    assert deployment.reconcile() == []  # its trigger may still come
    old = datetime.now(UTC) - timedelta(minutes=5)
    deployment.control.state.jobs[job_id]["createdAt"] = old.isoformat().replace("+00:00", "Z")

    assert [action.what for action in deployment.reconcile()] == ["run started"]
    assert deployment.reconcile() == []
    deployment.start_job(job_id=job_id)  # the trigger, late
    deployment.wait_for_end(job_id)
    assert deployment.states(job_id) == ["Completed"]
    deployment.expect_archived(job_id, files)
    changes = len(deployment.control.history())

    late: FlowRun = deployment.trigger_by_hand(job_id)
    until(lambda: deployment.states(job_id) == ["Completed", "Skipped"], 60, f"run {late.id}")
    assert len(deployment.control.history()) == changes
    assert deployment.reconcile() == []


@pytest.mark.usefixtures("worker")
def test_a_catalogue_that_is_away_at_the_end_is_told_by_a_run_that_moves_nothing(deployment: Deployment) -> None:
    files = deployment.world.add_dataset(PID, 5)
    away = deployment.control.fail("PATCH", r"/jobs/", 503, times=-1, after=1)
    job_id = deployment.start_job()
    until(lambda: deployment.states(job_id) == ["Failed"], 240, "the run to give up")
    assert deployment.status(job_id)[0] == "inProgress"
    deployment.control.remove(away)
    deployment.let_go()

    actions = deployment.reconcile()
    deployment.wait_for_end(job_id)

    assert [action.what for action in actions] == ["run started"]
    assert deployment.states(job_id) == ["Failed", "Completed"]
    assert deployment.fetched() == []
    deployment.expect_archived(job_id, files)
    deployment.expect_slots_back()


@pytest.mark.usefixtures("worker")
def test_of_two_jobs_for_one_dataset_the_second_adopts_what_the_first_archives(deployment: Deployment) -> None:
    files = deployment.add_held_dataset()
    deployment.proxy.rules[0] = Rule(TrickleReply(2, 6.0), "GET", "frames/08")
    jobs = [deployment.start_job(), deployment.start_job()]

    for job_id in jobs:
        deployment.wait_for_end(job_id)

    assert deployment.fetches() == dict.fromkeys(files, 1)
    created = [change.id for change in deployment.control.history("datablock")]
    assert len(created) == len(set(created)) == 3
    assert (False, False, "started") not in deployment.history()[1:]
    for job_id in jobs:
        deployment.expect_archived(job_id, files)
    deployment.expect_slots_back()


# -------------------------------------------------------------------------------------------- the owner, the facility
@pytest.fixture
def through_proxy(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    monkeypatch.setenv("MINIO_ENDPOINT", deployment.proxy.url)
    return deployment


def run_here(world: FlowWorld, kind: str, job_id: str) -> str:
    """Runs a job in this process; the name of the run's state."""
    from flows.archive import archive_datasetlist
    from flows.retrieve import retrieve_datasetlist

    flow = archive_datasetlist if kind == "archive" else retrieve_datasetlist
    state = anyio.run(partial(flow, job_id, return_state=True))
    assert not any(world.taken_slots().values())
    return str(state.name)


def test_missing_files_are_the_owners_error_and_the_sibling_is_archived(through_proxy: Deployment) -> None:
    world = through_proxy.world
    files = world.add_dataset(PID, 5)
    siblings = world.add_dataset(SIBLING, 5)
    missing = sorted(files)[2]
    with s3_client(world.s3) as client:
        client.delete_object(Bucket=world.landing_zone, Key=raw_object_key(PID, missing))
    job_id = through_proxy.control.seed_job("archive", [PID, SIBLING])

    assert run_here(world, "archive", job_id) == "CompletedWithDatasetErrors"

    assert through_proxy.status(job_id)[0] == "finishedWithDatasetErrors"
    assert missing in through_proxy.status(job_id)[1]
    assert through_proxy.history(PID) == [STARTED, USER_ERROR]
    assert through_proxy.told()["missingFiles"] == [missing]
    assert len(world.source_keys(PID)) == len(files) - 1
    assert through_proxy.history(SIBLING) == [STARTED, ARCHIVED]
    assert world.source_keys(SIBLING) == []
    assert len(siblings) == 5


@pytest.mark.parametrize(
    ("answer", "shown"),
    [(Answer(412, "PreconditionFailed"), USER_ERROR), (Answer(403, "AccessDenied"), SYSTEM_ERROR)],
    ids=["changed", "refused"],
)
def test_an_object_that_changed_is_the_owners_error_and_one_that_is_refused_the_facilitys(
    through_proxy: Deployment, answer: Answer, shown: tuple[bool, bool, str]
) -> None:
    world = through_proxy.world
    files = world.add_dataset(PID, 5)
    through_proxy.proxy.rules.append(Rule(answer, "GET", "frames/00003", times=math.inf))
    job_id = through_proxy.control.seed_job("archive", [PID])

    state = run_here(world, "archive", job_id)

    code = "finishedWithDatasetErrors" if shown == USER_ERROR else "finishedUnsuccessful"
    assert state == ("CompletedWithDatasetErrors" if shown == USER_ERROR else "Failed")
    assert through_proxy.status(job_id)[0] == code
    assert through_proxy.history() == [STARTED, shown]
    assert "frames/00003" in through_proxy.told()["message"]
    assert len(world.source_keys(PID)) == len(files)
    assert through_proxy.control.datablocks(PID) == []


def test_an_lts_that_cannot_be_written_is_the_facilitys_error(through_proxy: Deployment) -> None:
    world = through_proxy.world
    files = world.add_dataset(PID, 5)
    in_the_way = datablock_file(world.lts, 1, PID).parent
    in_the_way.parent.mkdir(parents=True, exist_ok=True)
    in_the_way.write_bytes(b"")
    job_id = through_proxy.control.seed_job("archive", [PID])

    assert run_here(world, "archive", job_id) == "Failed"

    assert through_proxy.status(job_id)[0] == "finishedUnsuccessful"
    assert through_proxy.history() == [STARTED, SYSTEM_ERROR]
    assert "the data is not at fault" in through_proxy.told()["message"]
    assert len(world.source_keys(PID)) == len(files)


def test_a_retrieval_tells_an_unknown_file_from_a_damaged_datablock(through_proxy: Deployment) -> None:
    world = through_proxy.world
    world.add_dataset(PID, 5)
    assert run_here(world, "archive", through_proxy.control.seed_job("archive", [PID])) == "Completed"

    unknown = through_proxy.control.seed_job("retrieve", {PID: ["frames/nobody-knows.tif"]})
    assert run_here(world, "retrieve", unknown) == "CompletedWithDatasetErrors"
    assert through_proxy.control.lifecycle(PID)["retrieveStatusMessage"] == "datasetRetrievalFailed"
    assert "nobody-knows" in through_proxy.told(PID, "retrieveReturnMessage")["message"]

    flip(datablock_file(world.lts, 1, PID), 700)
    damaged = through_proxy.control.seed_job("retrieve", [PID])
    assert run_here(world, "retrieve", damaged) == "Failed"
    assert through_proxy.status(damaged)[0] == "finishedUnsuccessful"
    now = through_proxy.control.lifecycle(PID)
    assert now["retrieveStatusMessage"] == "scheduleRetrieveJobFailed"
    assert not now["retrieveIntegrityCheck"]
    assert now["retrievable"] is True
