"""The documented limits over several flow runs in processes of their own, as the LTS and the server show them."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Iterator, Sequence

import pytest
from anyio.from_thread import start_blocking_portal

from flows.limits import LIMIT_TAGS
from tests.datasets import random_bytes
from tests.faults import FaultProxy, Rule, TrickleReply
from tests.flow_watch import FlowWatch, flow_processes
from tests.flow_world import LIMITS, FlowWorld, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

_RUNS = 4
_DATABLOCKS = 3  # of each of two datasets of each run
_MOVE_S = 0.6
_LEASE_S, _CHECKED_EVERY_S = 60, 15
_MIB = 1 << 20


@pytest.fixture
def slow_world(flow_world: FlowWorld, request: pytest.FixtureRequest) -> Iterator[FlowWorld]:
    """Every datablock takes its time to come from S3; the parameter says how long, in seconds."""
    move_s = getattr(request, "param", _MOVE_S)
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(FaultProxy(flow_world.s3.endpoint_url)) as proxy,
    ):
        proxy.rules.append(Rule(TrickleReply(4, move_s / 4), method="GET", target="/raw_files/", times=math.inf))
        flow_world.settings["MINIO_ENDPOINT"] = proxy.url
        yield flow_world


def _add_jobs(world: FlowWorld, datablocks: int = _DATABLOCKS) -> tuple[list[str], list[str]]:
    """Jobs of two datasets each, for one run each: (jobs, datasets)."""
    jobs, datasets = [], []
    for run in range(_RUNS):
        pids = [f"20.500.11935/{run}-{number}" for number in range(2)]
        for pid in pids:
            world.add_dataset(pid, {f"{number}.bin": random_bytes(_MIB, number) for number in range(datablocks)})
        jobs.append(world.control.seed_job("archive", pids))
        datasets += pids
    return jobs, datasets


def _tagged_runs(world: FlowWorld, tag: str) -> int:
    """Task runs on the server that carry a tag."""
    from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterTags

    with world.client() as client:
        return len(client.read_task_runs(task_run_filter=TaskRunFilter(tags=TaskRunFilterTags(all_=[tag]))))


def _wait_for(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    until(lambda: all(process.poll() is not None for process in processes), 240, "the ends of the runs")
    assert [process.returncode for process in processes] == [0] * len(processes)


def test_four_flow_runs_together_never_exceed_the_limits(slow_world: FlowWorld) -> None:
    jobs, datasets = _add_jobs(slow_world)
    with flow_processes(slow_world, "archive", jobs) as processes, FlowWatch(slow_world, processes) as archiving:
        _wait_for(processes)

    assert archiving.files["written"] == LIMITS["MOVE_TO_LTS_LIMIT"]
    assert archiving.files["read"] <= LIMITS["VERIFY_LTS_LIMIT"]  # reading takes milliseconds: not every look sees it
    assert +archiving.slots == {name: LIMITS[name] for name in LIMITS if name != "LTS_TO_RETRIEVAL_LIMIT"}
    assert all(slow_world.control.lifecycle_values(pid)[-1] == "datasetOnArchiveDisk" for pid in datasets)

    jobs = [slow_world.control.seed_job("retrieve", datasets[2 * run : 2 * run + 2]) for run in range(_RUNS)]
    with flow_processes(slow_world, "retrieve", jobs) as processes, FlowWatch(slow_world, processes) as retrieving:
        _wait_for(processes)

    assert retrieving.files["written"] == 0
    assert retrieving.files["read"] <= LIMITS["LTS_TO_RETRIEVAL_LIMIT"]
    assert +retrieving.slots == {"LTS_TO_RETRIEVAL_LIMIT": LIMITS["LTS_TO_RETRIEVAL_LIMIT"]}
    until(lambda: not any(slow_world.taken_slots().values()), 110, "the slots")
    until(lambda: all(_tagged_runs(slow_world, tag) for tag in LIMIT_TAGS.values()), 10, "task runs of all tags")


def test_the_watch_sees_more_datablocks_at_a_time_where_the_limits_are_higher(slow_world: FlowWorld) -> None:
    jobs, _ = _add_jobs(slow_world)
    slow_world.set_limits(LTS_FREE_LIMIT=4, MOVE_TO_LTS_LIMIT=8, VERIFY_LTS_LIMIT=4)
    with flow_processes(slow_world, "archive", jobs) as processes, FlowWatch(slow_world, processes) as watch:
        _wait_for(processes)

    assert LIMITS["MOVE_TO_LTS_LIMIT"] < watch.files["written"] <= 8
    assert LIMITS["MOVE_TO_LTS_LIMIT"] < watch.slots["MOVE_TO_LTS_LIMIT"] <= 8


# slower, as the server on SQLite takes seconds for the change while runs ask it for slots
@pytest.mark.parametrize("slow_world", [2.5], indirect=True)
def test_a_limit_that_is_raised_on_the_server_counts_for_the_runs_that_are_on(slow_world: FlowWorld) -> None:
    jobs, _ = _add_jobs(slow_world, datablocks=6)
    with flow_processes(slow_world, "archive", jobs) as processes:
        with FlowWatch(slow_world, processes) as before:
            until(lambda: before.files["written"] == 2 and before.looks > 50, what="two datablocks that are written")
        slow_world.set_limit("MOVE_TO_LTS_LIMIT", 3)
        with FlowWatch(slow_world, processes) as after:
            _wait_for(processes)

    assert before.files["written"] == 2
    assert after.files["written"] == 3


def test_one_run_waits_for_space_and_the_slot_of_a_killed_one_comes_back_by_itself(slow_world: FlowWorld) -> None:
    jobs, _ = _add_jobs(slow_world, datablocks=1)
    full = {"LTS_FREE_SPACE_PERCENTAGE": "99"}
    with flow_processes(slow_world, "archive", jobs, **full) as processes:
        with FlowWatch(slow_world, processes) as watch:
            until(lambda: watch.slots["LTS_FREE_LIMIT"] and watch.looks > 500, what="a run that waits for space")
        assert +watch.slots == {"LTS_FREE_LIMIT": 1}
        assert +watch.files == {}
        for process in processes:
            process.kill()
        killed_s = time.monotonic()
        until(lambda: not any(slow_world.taken_slots().values()), 120, "the slot of a killed run")
        back_s = time.monotonic() - killed_s
    assert back_s < _LEASE_S + 2 * _CHECKED_EVERY_S
