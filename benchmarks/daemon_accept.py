"""A burst of jobs while the daemon transfers at full rate: how long each takes to be accepted, what transfers lose.

Each round has a span with transfers alone and one with a burst at its beginning, in turn. Transfers are archivals that
never end: there are always more datasets queued than are worked on. The jobs of the burst are archivals of other
datasets, of the same owner with the lowest priority: they are durable, and wait behind the transfers. They are
cancelled after the span. An accept lasts from the first byte of the request to the last byte of the answer, over
connections that stay, each with one request at a time and no pause. The rate is that of bytes received from S3.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import anyio
import msgspec

from benchmarks.daemon_support import (
    OWNER,
    Bystander,
    Child,
    Connection,
    DaemonBench,
    Transfers,
    add_daemon_options,
    load,
    open_daemon,
    percentile,
    summary_ms,
)
from benchmarks.support import MIB, print_table, spread

__all__ = ["main"]

_MOST_P99_MS = 50.0
_MOST_LOST = 0.05
_DATASETS, _DATASET_BYTES = 12, 256 * MIB
_SETTLE_S = 2.0


class Order(msgspec.Struct, frozen=True):
    """What the child process does: ``jobs`` with keys and datasets after ``name``."""

    port: int
    jobs: int
    connections: int
    name: str = ""


class Burst(msgspec.Struct, frozen=True):
    """What the child process did. ``cpu_s``: its own."""

    accepts_s: list[float]
    burst_s: float
    cpu_s: float
    job_ids: list[str] = []


class Round(msgspec.Struct, frozen=True):
    """One round. Rates in bytes per second: of the span without a burst, of the one with it, and of the burst alone."""

    quiet_rate: float
    burst_rate: float
    within_rate: float
    burst: Burst
    bystander_p99_ms: float
    load: float

    @property
    def lost(self) -> float:
        """Share of the rate that is lost in the span."""
        return 1 - self.burst_rate / self.quiet_rate

    @property
    def lost_within(self) -> float:
        """Share of the rate that is lost while the burst lasts."""
        return 1 - self.within_rate / self.quiet_rate


# ----------------------------------------------------------------------------------------------- the child process
async def _burst(order: Order) -> Burst:
    name, numbers = order.name, iter(range(order.jobs))
    accepts_s: list[float] = []
    job_ids: list[str] = []
    connections = [await Connection.open(order.port) for _ in range(order.connections)]

    async def submit(connection: Connection) -> None:
        for number in numbers:  # shared: each connection takes the next one
            job = {"kind": "archive", "dataset_ids": [f"{name}/{number}"], "owner": OWNER, "priority": -100}
            body, key = msgspec.json.encode(job), f"Idempotency-Key: {name}-{number}\r\n"
            began_s = time.perf_counter()
            status, answer = await connection.request("POST", "/v1/jobs", body, key)
            accepts_s.append(time.perf_counter() - began_s)
            if status != 202:
                raise RuntimeError(answer.decode())
            job_ids.append(msgspec.json.decode(answer)["id"])

    began_s, cpu_s = time.perf_counter(), time.process_time()
    async with anyio.create_task_group() as tasks:
        for connection in connections:
            tasks.start_soon(submit, connection)
    burst = Burst(accepts_s, time.perf_counter() - began_s, time.process_time() - cpu_s, job_ids)
    for connection in connections:
        await connection.close()
    return burst


async def _clean(order: Order, job_ids: list[str]) -> None:
    connection = await Connection.open(order.port)
    for job_id in job_ids:
        status, answer = await connection.request("DELETE", f"/v1/jobs/{job_id}")
        if status != 200:
            raise RuntimeError(answer.decode())
    await connection.close()


def _child() -> None:
    """Everything is imported before the burst begins. A line is an order; one without a name cancels the last jobs."""
    burst: Burst | None = None
    while line := sys.stdin.buffer.readline():
        order = msgspec.json.decode(line, type=Order)
        if order.name or burst is None:
            burst = anyio.run(_burst, order, backend_options={"use_uvloop": True})
        else:
            anyio.run(_clean, order, burst.job_ids, backend_options={"use_uvloop": True})
        told = msgspec.structs.replace(burst, job_ids=[])
        print(msgspec.json.encode(told).decode(), flush=True)


# ------------------------------------------------------------------------------------------------- the measurement
def _rate(bench: DaemonBench, began: tuple[float, float]) -> float:
    ended_s, ended_bytes = bench.received()
    return (ended_bytes - began[1]) / (ended_s - began[0])


def _round(bench: DaemonBench, client: Child, order: Order, span_s: float, *, burst_first: bool) -> Round:
    quiet_rate = burst_rate = within_rate = late_ms = 0.0
    burst: Burst | None = None
    for with_burst in (burst_first, not burst_first):
        time.sleep(_SETTLE_S)
        began = bench.received()
        if with_burst:
            with Bystander() as bystander:
                client.tell(order)
                burst = client.result(Burst)
            within_rate, late_ms = _rate(bench, began), bystander.p99_ms
        time.sleep(max(0.0, began[0] + span_s - time.monotonic()))
        rate = _rate(bench, began)
        if with_burst:
            burst_rate = rate
            client.tell(msgspec.structs.replace(order, name=""))
            client.result(Burst)
        else:
            quiet_rate = rate
    if burst is None:
        raise AssertionError
    return Round(quiet_rate, burst_rate, within_rate, burst, late_ms, load())


def _measure(options: argparse.Namespace) -> list[Round]:
    rounds = []
    with (
        open_daemon(options, gib=3) as bench,
        Child("benchmarks.daemon_accept") as client,
        Transfers(bench, _DATASETS, _DATASET_BYTES) as transfers,
    ):
        for number in range(options.rounds + 1):
            transfers.until_under_way()
            order = Order(bench.port, options.jobs, options.connections, f"burst{number}")
            measured = _round(bench, client, order, options.span_s, burst_first=bool(number % 2))
            transfers.check()
            if number:  # the first round warms everything up
                rounds.append(measured)
            print(_line(number, measured), file=sys.stderr)
    return rounds


def _line(number: int, item: Round) -> str:
    p50, p99, most = summary_ms(item.burst.accepts_s)
    return (
        f"round {number}: accepts p50 {p50:.1f}, p99 {p99:.1f}, max {most:.1f} ms in {item.burst.burst_s:.2f} s; "
        f"{item.quiet_rate / 1e6:.0f} MB/s, with the burst {item.burst_rate / 1e6:.0f}, "
        f"while it lasted {item.within_rate / 1e6:.0f}; "
        f"an idle thread late by {item.bystander_p99_ms:.1f} ms (p99), load {item.load:.1f}"
    )


def _print(rounds: list[Round], options: argparse.Namespace) -> None:
    print(f"{options.jobs} jobs over {options.connections} connections, median (min..max) of {len(rounds)} rounds:")
    accepts_s = [value_s for item in rounds for value_s in item.burst.accepts_s]
    table = [summary_ms(item.burst.accepts_s) for item in rounds]
    rows = [
        ("accept, p50, ms", spread([row[0] for row in table], 1)),
        ("accept, p99, ms", spread([row[1] for row in table], 1)),
        ("accept, max, ms", spread([row[2] for row in table], 1)),
        ("accepts of all rounds, p99, ms", f"{1000 * percentile(accepts_s, 0.99):.1f}"),
        ("the burst, s", spread([item.burst.burst_s for item in rounds])),
        ("transfers alone, MB/s", spread([item.quiet_rate / 1e6 for item in rounds], 0)),
        (f"{options.span_s:.0f} s with the burst, MB/s", spread([item.burst_rate / 1e6 for item in rounds], 0)),
        ("lost in this span, %", spread([100 * item.lost for item in rounds], 1)),
        ("while the burst lasts, MB/s", spread([item.within_rate / 1e6 for item in rounds], 0)),
        ("lost meanwhile, %", spread([100 * item.lost_within for item in rounds], 1)),
        ("processor time of the client, s", spread([item.burst.cpu_s for item in rounds])),
        ("an idle thread is woken late, p99, ms", spread([item.bystander_p99_ms for item in rounds], 1)),
        ("load of the machine", spread([item.load for item in rounds], 1)),
    ]
    print_table(("", ""), rows)


def main() -> None:
    """Prints a table, or JSON; fails when accepts take too long, or transfers lose too much."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_daemon_options(parser)
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count; one more warms up (default: 7)")
    parser.add_argument("--jobs", type=int, default=1000, help="of a burst (default: 1000)")
    parser.add_argument("--connections", type=int, default=8, help="that the burst comes over (default: 8)")
    parser.add_argument("--span-s", type=float, default=20.0, help="what the rates are taken over (default: 20)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child()
        return
    rounds = _measure(options)
    if options.json:
        print(json.dumps(msgspec.to_builtins(rounds)))
    else:
        _print(rounds, options)
    missed = []
    p99_ms = 1000 * percentile([value_s for item in rounds for value_s in item.burst.accepts_s], 0.99)
    if p99_ms >= _MOST_P99_MS:
        missed.append(f"accepts take {p99_ms:.0f} ms (p99)")
    lost = percentile([item.lost for item in rounds], 0.5)
    if lost > _MOST_LOST:
        missed.append(f"transfers lose {100 * lost:.1f} % of their rate")
    if missed:
        sys.exit("; ".join(missed))


if __name__ == "__main__":
    main()
