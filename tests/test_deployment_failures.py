"""Containers are killed and networks cut in the middle of moves, on a real Docker engine: every dataset arrives."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

import pytest

from tests.deployment_moves import HELD, LARGE, MIB, SMALL, Facility, Link, linked
from tests.deployments import Deployment, docker
from tests.flow_world import until

pytestmark = [pytest.mark.docker]

_CASES = ("killed", "worker", "postgres", "server", "s3", "network")
_POOL = "archival-docker-workpool"
_CUT_S = 60.0
_REPLY_S = 2.0  # the windows before the held one come late enough for a checkpoint
_LAST_FILE = "frames/4.tif"
_LAST_WINDOW = f"large.bin bytes={64 * MIB}-{66 * MIB - 1}"


class Moves:
    """A dataset for each case, all held at once in the middle of their moves; each test lets its own go."""

    def __init__(self, facility: Facility, link: Link) -> None:
        self.facility, self.link, self._stamp = facility, link, uuid.uuid4().hex[:8]
        self._held = {self.dataset_id(case) for case in _CASES}
        self._hold()
        sizes = {case: LARGE if case == "killed" else SMALL for case in _CASES}
        self.files = {case: facility.add_dataset(self.dataset_id(case), sizes[case]) for case in _CASES}
        self.jobs = {case: facility.order("archive", [self.dataset_id(case)]) for case in _CASES}
        for case in _CASES:
            facility.wait_until_held(self.jobs[case], self.dataset_id(case))
        assert facility.taken_slots()["MOVE_TO_LTS_LIMIT"] == len(_CASES)
        link.forget()

    def dataset_id(self, case: str) -> str:
        return f"20.500.11935/{self._stamp}-{case}"

    def container(self, case: str) -> str:
        """The runtime container of a case's flow run."""
        return self.facility.deployment.runtime_container(self.facility.runs(self.jobs[case])[-1]["id"])

    def let_go(self, case: str) -> None:
        self._held -= {self.dataset_id(case)}
        self._hold()

    def _hold(self) -> None:
        held = [f"{dataset_id}/raw_files/{part}" for dataset_id in self._held for part in HELD]
        self.link.set(held=held, reply_s=_REPLY_S)

    def fetches(self, case: str) -> dict[str, int]:
        return self.link.fetches(self.dataset_id(case))

    def expect_archived(self, case: str, states: list[str]) -> None:
        """The job ends well after runs that ended in ``states``."""
        self.facility.wait_for_end(self.jobs[case])
        assert self.facility.states(self.jobs[case]) == states
        self.facility.expect_archived(self.jobs[case], self.files[case], self.dataset_id(case))


@pytest.fixture(scope="module")
def moves(docker_deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moves]:
    facility = Facility(docker_deployment)
    with linked(facility, tmp_path_factory.mktemp("link") / "control") as link:
        facility.set_limit("MOVE_TO_LTS_LIMIT", 2 * len(_CASES))
        facility.set_pool_limit(_POOL, len(_CASES))
        yield Moves(facility, link)


def restart(deployment: Deployment, service: str) -> None:
    """Kills a service's container and starts it."""
    container = deployment.container(service)
    docker("kill", container)
    docker("start", container)
    deployment.wait_until_healthy(service)


def test_a_killed_runtime_container_is_followed_by_a_run_that_fetches_only_what_was_not_durable(moves: Moves) -> None:
    docker("kill", moves.container("killed"))
    moves.let_go("killed")
    job_id = moves.jobs["killed"]
    # The worker sees it at once, unless the container is gone before it asks: then the heartbeats tell.
    until(lambda: moves.facility.states(job_id)[0] == "Crashed", 200, "the end of the run")
    moves.facility.reconcile()

    moves.expect_archived("killed", ["Crashed", "Completed"])
    assert moves.fetches("killed") == {_LAST_WINDOW: 1}


def test_a_killed_worker_leaves_the_run_in_its_container_alone(moves: Moves) -> None:
    deployment = moves.facility.deployment
    worker = deployment.container("prefect-archival-worker")
    docker("kill", worker)
    moves.let_go("worker")

    moves.expect_archived("worker", ["Completed"])
    assert moves.fetches("worker") == {}
    docker("start", worker)
    deployment.wait_until_healthy("prefect-archival-worker")


@pytest.mark.parametrize(("case", "service"), [("postgres", "postgres"), ("server", "prefect-server")])
def test_a_move_goes_on_over_a_killed(moves: Moves, case: str, service: str) -> None:
    restart(moves.facility.deployment, service)
    moves.let_go(case)

    moves.expect_archived(case, ["Completed"])
    assert moves.fetches(case) == {}


def test_a_move_goes_on_over_a_killed_s3_server(moves: Moves) -> None:
    restart(moves.facility.deployment, "s3")
    moves.let_go("s3")

    moves.expect_archived("s3", ["Completed"])
    assert {part.split()[0] for part in moves.fetches("s3")} <= {_LAST_FILE}


def test_a_move_goes_on_after_a_minute_without_network_to_the_s3_server(moves: Moves) -> None:
    moves.link.cut()
    began = time.monotonic()
    moves.let_go("network")
    until(lambda: time.monotonic() - began > _CUT_S, _CUT_S + 5, "a minute")
    assert moves.facility.states(moves.jobs["network"]) == ["Running"]
    moves.link.mend()

    moves.expect_archived("network", ["Completed"])
    assert {part.split()[0] for part in moves.fetches("network")} <= {_LAST_FILE}


def test_no_slot_stays_taken_not_even_by_the_killed_run(moves: Moves) -> None:
    moves.facility.expect_slots_back()
