"""Event streams while the daemon transfers: how late the loop is as it counts it itself, and as a caller sees it.

Each round has a span without streams and one with all of them open, in turn, over the same transfers: one job that
archives dataset after dataset. All streams are of this job, so each gets every one of its events. The loop's lag comes
from the daemon's metrics (a timer that is due ten times a second); from outside, `/livez` is asked every 20 ms over a
connection that stays. Readers and asker are processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from contextlib import ExitStack
from typing import Self

import anyio
import msgspec

from benchmarks.daemon_support import (
    OWNER,
    Bystander,
    Child,
    Connection,
    DaemonBench,
    Lag,
    add_daemon_options,
    lag_between,
    load,
    open_daemon,
    percentile,
    summary_ms,
)
from benchmarks.support import MIB, print_table, spread

__all__ = ["main"]

_MOST_LAG_MS = 50.0
_EVENTS_PER_S = 8.0
_DATASET_BYTES = 256 * MIB
_ASK_EVERY_S = 0.02
_SETTLE_S = 2.0
_POLL_S = 0.5


class Reading(msgspec.Struct, frozen=True):
    """What the readers got within the span: events of each stream and second, and bytes of all."""

    events_per_s: list[float]
    received_bytes: int
    cpu_s: float


class Span(msgspec.Struct, frozen=True):
    """One span."""

    lag: Lag
    asked_s: list[float]
    rate: float
    reading: Reading | None
    bystander_p99_ms: float
    load: float


# --------------------------------------------------------------------------------------------- the child processes
class Task(msgspec.Struct, frozen=True):
    """What a child process does for so long; ``path``: of the streams, or '' to ask ``/livez``."""

    port: int
    span_s: float
    path: str = ""
    streams: int = 0


async def _ask(task: Task) -> list[float]:
    connection = await Connection.open(task.port)
    asked_s = []
    due_s = time.perf_counter()
    end_s = due_s + task.span_s
    while due_s < end_s:
        began_s = time.perf_counter()
        status, _ = await connection.request("GET", "/livez")
        asked_s.append(time.perf_counter() - began_s)
        if status != 200:
            raise RuntimeError(status)
        due_s = max(due_s + _ASK_EVERY_S, time.perf_counter())
        await anyio.sleep(max(0.0, due_s - time.perf_counter()))
    await connection.close()
    return asked_s


async def _read(task: Task) -> Reading:
    counts = [0] * task.streams
    size_bytes = 0
    counting = False

    async def read(number: int) -> None:
        nonlocal size_bytes
        connection = await Connection.open(task.port)
        await connection.send("GET", task.path, headers="Accept: text/event-stream\r\n")
        status, _ = await connection.head()
        if status != 200:
            raise RuntimeError(status)
        rest = b""
        while True:
            piece = rest + await connection.receive()
            rest = piece[-len(b"\nevent: ") + 1 :]
            if counting:
                counts[number] += piece.count(b"\nevent: ")
                size_bytes += len(piece)

    async with anyio.create_task_group() as tasks:
        for number in range(task.streams):
            tasks.start_soon(read, number)
        await anyio.sleep(_SETTLE_S)  # what happened before is told first
        counting, began_s, cpu_s = True, time.perf_counter(), time.process_time()
        await anyio.sleep(task.span_s)
        span_s = time.perf_counter() - began_s
        reading = Reading([count / span_s for count in counts], size_bytes, time.process_time() - cpu_s)
        tasks.cancel_scope.cancel()
    return reading


def _child() -> None:
    """A line on stdin is a task; its result is a line on stdout."""
    while line := sys.stdin.buffer.readline():
        task = msgspec.json.decode(line, type=Task)
        result = anyio.run(_read if task.path else _ask, task, backend_options={"use_uvloop": True})
        print(msgspec.json.encode(result).decode(), flush=True)


# ------------------------------------------------------------------------------------------------- the measurement
class _LongJob:
    """One job that archives datasets for as long as the rounds take; those that are done go from the LTS at once."""

    def __init__(self, bench: DaemonBench, datasets: int) -> None:
        self._bench = bench
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="long-job")
        ids = [f"streams/{number}" for number in range(datasets)]
        bench.add_datasets(ids, {"data.bin": os.urandom(_DATASET_BYTES)})
        self.job_id = bench.daemon.order("archive", *ids, owner=OWNER)
        self.states: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._bench.cancel(self.job_id)

    def check(self) -> None:
        """Raises RuntimeError when it is over, or a dataset has failed."""
        states = list(self.states.values())
        if "failed" in states or (states and all(state == "done" for state in states)):
            raise RuntimeError(states)

    def _run(self) -> None:
        while not self._stop.wait(_POLL_S):
            jobs = self._bench.client.get("/v1/jobs", params={"owner": OWNER, "limit": 1}).json()["jobs"]
            for dataset in jobs[0]["datasets"]:
                before, now = self.states.get(dataset["dataset_id"]), dataset["state"]
                if now == "done" and before != "done":
                    self._bench.forget(dataset["dataset_id"])
                self.states[dataset["dataset_id"]] = now


def _span(bench: DaemonBench, clients: tuple[Child, Child], task: Task | None, span_s: float) -> Span:
    reader, asker = clients
    if task is not None:
        reader.tell(task)
    time.sleep(_SETTLE_S)
    before, began = bench.metrics(), bench.received()
    with Bystander() as bystander:
        asker.tell(Task(bench.port, span_s))
        asked_s = asker.result(list[float])
    ended, after = bench.received(), bench.metrics()
    reading = reader.result(Reading) if task is not None else None
    rate = (ended[1] - began[1]) / (ended[0] - began[0])
    return Span(lag_between(before, after), asked_s, rate, reading, bystander.p99_ms, load())


def _measure(options: argparse.Namespace) -> dict[str, list[Span]]:
    names = ("no streams", f"{options.streams} streams")
    spans: dict[str, list[Span]] = {name: [] for name in names}
    with ExitStack() as stack:
        limits = {"MOVE_TO_LTS_LIMIT": "2", "VERIFY_LTS_LIMIT": "2"}
        bench = stack.enter_context(open_daemon(options, gib=4, **limits))
        module = "benchmarks.daemon_streams"
        clients = (stack.enter_context(Child(module)), stack.enter_context(Child(module)))
        job = stack.enter_context(_LongJob(bench, options.datasets))
        path = f"/v1/jobs/{job.job_id}/events"
        for number in range(options.rounds + 1):
            for name in names if number % 2 else reversed(names):
                task = Task(bench.port, options.span_s, path, options.streams) if name == names[1] else None
                span = _span(bench, clients, task, options.span_s)
                job.check()
                if number:  # the first round warms everything up
                    spans[name].append(span)
                print(_line(f"round {number}, {name}", span), file=sys.stderr)
    return spans


def _line(name: str, span: Span) -> str:
    p50, p99, most = summary_ms(span.asked_s)
    lag = f"lag p50 <= {span.lag.p50_ms:g}, p99 <= {span.lag.p99_ms:g}, max <= {span.lag.max_ms:g} ms"
    events = f"; {percentile(span.reading.events_per_s, 0.5):.1f} events/s on each stream" if span.reading else ""
    asked = f"/livez p50 {p50:.1f}, p99 {p99:.1f}, max {most:.1f} ms"
    idle = f"an idle thread late by {span.bystander_p99_ms:.1f} ms (p99)"
    return f"{name}: {lag}; {asked}; {span.rate / 1e6:.0f} MB/s{events}; {idle}, load {span.load:.1f}"


def _print(spans: dict[str, list[Span]]) -> None:
    print("Milliseconds, median (min..max) of the rounds; the loop's lag as the upper bound of its bucket:")
    header = (
        "",
        "lag p50",
        "p99",
        "max",
        "/livez p50",
        "p99",
        "max",
        "MB/s",
        "events/s per stream",
        "idle thread late, p99",
        "load",
    )
    rows = []
    for name, items in spans.items():
        asked = [summary_ms(item.asked_s) for item in items]
        rates = [rate for item in items if item.reading for rate in item.reading.events_per_s]
        rows.append(
            (
                name,
                *(spread([getattr(item.lag, field) for item in items], 1) for field in ("p50_ms", "p99_ms", "max_ms")),
                *(spread([row[column] for row in asked], 1) for column in range(3)),
                spread([item.rate / 1e6 for item in items], 0),
                spread(rates, 1) if rates else "-",
                spread([item.bystander_p99_ms for item in items], 1),
                spread([item.load for item in items], 1),
            )
        )
    print_table(header, rows)


def main() -> None:
    """Prints a table, or JSON; fails when the loop lags, or when the streams had too little to do."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_daemon_options(parser)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count; one more warms up (default: 5)")
    parser.add_argument("--streams", type=int, default=50, help="that are open (default: 50)")
    parser.add_argument("--span-s", type=float, default=15.0, help="of one measurement (default: 15)")
    parser.add_argument("--datasets", type=int, default=400, help="of 256 MiB, that there are (default: 400)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child()
        return
    spans = _measure(options)
    if options.json:
        print(json.dumps(msgspec.to_builtins(spans)))
    else:
        _print(spans)
    with_streams = spans[f"{options.streams} streams"]
    if (
        events := min(rate for item in with_streams if item.reading for rate in item.reading.events_per_s)
    ) < _EVENTS_PER_S:
        sys.exit(f"a stream had {events:.1f} events/s, which proves nothing")
    if (lag_ms := percentile([item.lag.p99_ms for item in with_streams], 0.5)) > _MOST_LAG_MS:
        sys.exit(f"the loop lags by up to {lag_ms:.0f} ms (p99)")


if __name__ == "__main__":
    main()
