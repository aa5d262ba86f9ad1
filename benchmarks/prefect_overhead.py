"""What Prefect costs: a job from its order to its end, and the LTS's idle time between datablocks.

Real parts: a Prefect server (SQLite) with the deployment's settings, a process worker, S3, SciCat's fake. The same jobs
run without Prefect in turn: the engine and the catalogue in a process of their own. Moves are seen from outside: the
LTS folder is looked at every 5 ms; a move lasts from the appearance of a datablock's temporary file to its rename. A
proxy in front of S3 makes each of them last about a second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import msgspec

from benchmarks.support import add_server_options, open_server, print_table, spread
from mover.model import Stage

if TYPE_CHECKING:
    from benchmarks.flow_bench import FlowBench

__all__ = ["main"]

_SLOTS = 2
_MOST_IDLE = 0.10
_TASKS = 60
_RESULTS = Path("results")
_WAYS = ("flow", "engine alone")


class Job(msgspec.Struct, frozen=True):
    """One job. Seconds; ``_s`` fields that a way does not have are 0.

    ``started_s``, ``first_request_s``, ``first_byte_s``: since the run was ordered. ``finished_s``: from the last
    rename to the job's end in the catalogue; ``completed_s``: to Completed.
    """

    started_s: float
    first_request_s: float
    first_byte_s: float
    finished_s: float
    completed_s: float
    moves_s: list[float]
    gaps_s: list[float]

    @property
    def idle(self) -> float:
        """Sum of the gaps in the slots, as a share of the sum of the moves."""
        return sum(self.gaps_s) / sum(self.moves_s)


class TaskCosts(msgspec.Struct, frozen=True):
    """Milliseconds of stages that do nothing: as a task, and as a task that takes a slot or is handed one on."""

    first_task_ms: float
    task_ms: list[float]
    first_slot_ms: list[float]
    slot_ms: list[float]
    handed_on_ms: list[float]


def _job(bench: FlowBench, way: str, datablocks: int) -> Job:
    from benchmarks.flow_bench import MoveWatch

    dataset_id, job_id = bench.add_job(datablocks)
    requested, asked = bench.first_requests()
    with MoveWatch(bench.world.lts, dataset_id) as watch:
        ordered_s = time.time()
        if way == "flow":
            run = bench.run_flow(job_id)
            assert run.start_time is not None and run.end_time is not None  # noqa: PT018, S101 - it has completed
            started_s, ended_s = run.start_time.timestamp(), run.end_time.timestamp()
        else:
            started_s, ended_s = msgspec.json.decode(bench.run_child("--child", job_id), type=tuple[float, float])
    if len(watch.moves) != datablocks:
        sys.exit(f"{len(watch.moves)} of {datablocks} moves were seen")
    last_s = max(move.ended_s for move in watch.moves)
    return Job(
        started_s=started_s - ordered_s,
        first_request_s=requested.result() - ordered_s,
        first_byte_s=asked.result() - ordered_s,
        finished_s=bench.job_finished_s(job_id) - last_s,
        completed_s=ended_s - last_s,
        moves_s=[move.length_s for move in watch.moves],
        gaps_s=watch.gaps(_SLOTS),
    )


async def _run_job(job_id: str) -> tuple[float, float]:
    """A job as the flow runs it, without Prefect; returns when it began and ended."""
    from mover.engine import Engine
    from mover.jobs import JobRunner
    from mover.jobs_result import job_result
    from mover.scicat import SciCat
    from mover.settings import load_settings
    from mover.wiring import engine_config, scicat_access

    began_s = time.time()
    settings = load_settings()
    async with (
        SciCat.open(scicat_access(settings)) as catalogue,
        Engine.open(engine_config(settings), catalogue=catalogue) as engine,
    ):
        jobs = JobRunner(engine, catalogue)
        datasets = await jobs.read(job_id, "archive")
        await jobs.begin(job_id, "")
        outcomes = [(await jobs.archive(item.dataset_id, release_source=True)).outcome for item in datasets]
        await jobs.finish(job_id, "archive", outcomes, job_result(outcomes))
    return began_s, time.time()


async def _task_costs() -> TaskCosts:
    from prefect import flow

    from flows.slots import open_slots
    from flows.stages import StageTasks

    async def nothing() -> None:
        pass

    @flow(name="costs", persist_result=False)
    async def costs() -> TaskCosts:
        async with open_slots() as slots:
            run_stage = StageTasks(slots)

            async def timed(stage: Stage, pause_s: float = 0.0) -> float:
                await anyio.sleep(pause_s)
                began_s = time.perf_counter()
                await run_stage(stage, "nothing", nothing)
                return 1000 * (time.perf_counter() - began_s)

            return TaskCosts(
                first_task_ms=await timed(Stage.REGISTER),
                task_ms=[await timed(Stage.REGISTER) for _ in range(_TASKS)],
                first_slot_ms=[await timed(stage) for stage in (Stage.SPACE, Stage.MOVE, Stage.VERIFY, Stage.RETRIEVE)],
                slot_ms=[await timed(Stage.MOVE, pause_s=0.3) for _ in range(_TASKS)],
                handed_on_ms=[await timed(Stage.MOVE) for _ in range(_TASKS)],
            )

    return await costs()


def _measure(options: argparse.Namespace) -> tuple[dict[str, list[Job]], dict[str, list[Job]], TaskCosts]:
    from benchmarks.flow_bench import open_flow_bench

    small: dict[str, list[Job]] = {way: [] for way in _WAYS}
    large: dict[str, list[Job]] = {way: [] for way in _WAYS}
    with open_server(options, gib=4) as server, open_flow_bench(server, options.target) as bench:
        for number in range(options.rounds + 1):
            for way in _WAYS:
                job = _job(bench, way, 1)
                if number:  # the first round warms the servers up
                    small[way].append(job)
        costs = msgspec.json.decode(bench.run_child("--child", ""), type=TaskCosts)
        bench.throttle(1.0)
        for _ in range(options.gap_rounds):
            for way in _WAYS:
                large[way].append(_job(bench, way, options.datablocks))
    return small, large, costs


def _print(small: dict[str, list[Job]], large: dict[str, list[Job]], costs: TaskCosts) -> None:
    print("One datablock of 1 MiB, seconds, median (min..max):")
    names = ("started_s", "first_request_s", "first_byte_s", "finished_s", "completed_s")
    rows = [(way, *(spread([getattr(job, name) for job in jobs]) for name in names)) for way, jobs in small.items()]
    order, last = "order to ", "last rename to "
    print_table(("", order + "start", order + "S3", order + "first byte", last + "catalogue", last + "end"), rows)
    print(f"\n{len(large['flow'][0].moves_s)} datablocks, {_SLOTS} at a time, milliseconds, median (min..max):")
    rows = []
    for way, jobs in large.items():
        moves = [1000 * length_s for job in jobs for length_s in job.moves_s]
        found = [1000 * gap_s for job in jobs for gap_s in job.gaps_s]
        idle = spread([100 * job.idle for job in jobs])
        rows.append((way, spread(moves, 0), spread(found, 0), idle, spread([job.completed_s for job in jobs])))
    print_table(("", "move", "gap in a slot", "sum of gaps / moves, %", last + "end, s"), rows)
    print("\nStages that do nothing, milliseconds, median (min..max):")
    rows = [
        ("task run", spread(costs.task_ms, 1)),
        ("task run that takes a slot", spread(costs.slot_ms, 1)),
        ("task run that is handed a slot on", spread(costs.handed_on_ms, 1)),
        ("first task run of a process", f"{costs.first_task_ms:.1f}"),
        ("first slot of each limit", spread(costs.first_slot_ms, 1)),
    ]
    print_table(("", ""), rows)


def _plot(large: dict[str, list[Job]]) -> Path:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for way, jobs in large.items():
        found = sorted(1000 * gap_s for job in jobs for gap_s in job.gaps_s)
        axes.plot(found, [(index + 1) / len(found) for index in range(len(found))], label=way, drawstyle="steps-post")
    axes.set(
        xlabel="time between two datablocks in a slot, ms", ylabel="share of the gaps that are shorter", ylim=(0, 1)
    )
    axes.set_xlim(left=0)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    _RESULTS.mkdir(exist_ok=True)
    path = _RESULTS / "prefect_overhead.svg"
    figure.savefig(path)
    plt.close(figure)
    return path


def main() -> None:
    """Prints tables, or JSON, and plots the gaps; fails when the LTS idles for too long."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_server_options(parser)
    parser.add_argument("--rounds", type=int, default=5, help="jobs of one datablock; one more warms up (default: 5)")
    parser.add_argument("--gap-rounds", type=int, default=3, help="jobs of many datablocks (default: 3)")
    parser.add_argument("--datablocks", type=int, default=100, help="of one of these (default: 100)")
    parser.add_argument("--target", default="/dev/shm", help="file system of the LTS (default: /dev/shm)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        done = anyio.run(_run_job, options.child) if options.child else anyio.run(_task_costs)
        sys.stdout.buffer.write(msgspec.json.encode(done))
        return
    small, large, costs = _measure(options)
    plot = _plot(large)
    if options.json:
        print(json.dumps(msgspec.to_builtins({"one_datablock": small, "datablocks": large, "tasks": costs})))
    else:
        _print(small, large, costs)
        print(f"\nplot: {plot}")
    idle = statistics.median(job.idle for job in large["flow"])
    if idle >= _MOST_IDLE:
        sys.exit(f"the slots idle for {100 * idle:.1f} % of the transfer time")


if __name__ == "__main__":
    main()
