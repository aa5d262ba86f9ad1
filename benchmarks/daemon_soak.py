"""The daemon for a while under mixed jobs: whether its memory and its open files stay where they are.

Clients order archivals, verifications, retrievals and plans of datasets small and large, each with a name of its own;
some jobs fail by the user's fault, some are cancelled, some orders are refused; jobs are followed by their events, or
by asking, and some readers leave early. What was archived and retrieved is removed again, so that only the daemon can
grow. Its resident memory, threads and open files are read from /proc every second, from outside; its page and metrics
are fetched every 15 s. The verdict on the memory is the slope of the second half: of the medians of 20 parts of it, by
least squares. Of open files, dozens of which come and go with the retrievals, it is how many more there are when they
are fewest: in the last quarter, compared with the second one.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.daemon_soak_jobs import SoakClients
from benchmarks.daemon_support import DaemonBench, add_daemon_options, load, open_daemon
from benchmarks.support import print_table

__all__ = ["Sample", "floor_growth_per_h", "main", "slope_per_h"]

_MOST_MIB_PER_H = 30.0
_MOST_FILES_PER_H = 6.0
_EVERY_S = 1.0
_WINDOWS = 20
_SCRAPE_EVERY_S = 15.0
_RESULTS = Path("results")
_BUFFER_MIB = 64


class Sample(msgspec.Struct, frozen=True):
    """One moment. ``at_s``: since the begin; ``heap_mib``: of the memory, what belongs to no file."""

    at_s: float
    memory_mib: float
    heap_mib: float
    files: int
    threads: int
    jobs: int
    load: float


class Soak(msgspec.Struct, frozen=True):
    """What came of it."""

    samples: list[Sample]
    ended: dict[str, int]
    wrong: list[str]
    exit_code: int

    @property
    def second_half(self) -> list[Sample]:
        """What counts."""
        middle_s = self.samples[-1].at_s / 2
        return [item for item in self.samples if item.at_s >= middle_s]

    @property
    def more_files_per_h(self) -> float:
        """Open files at their fewest."""
        return floor_growth_per_h([(item.at_s, item.files) for item in self.samples])

    def slope(self, name: str) -> float:
        """Of a column, in the second half, per hour."""
        return slope_per_h([(item.at_s, getattr(item, name)) for item in self.second_half])


def floor_growth_per_h(points: Sequence[tuple[float, float]]) -> float:
    """How much the lowest value of the last quarter is above that of the second one, per hour."""
    quarter_s = points[-1][0] / 4
    before = min(value for at_s, value in points if quarter_s <= at_s < 2 * quarter_s)
    after = min(value for at_s, value in points if at_s >= 3 * quarter_s)
    return (after - before) / (2 * quarter_s / 3600)


def slope_per_h(points: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope of the medians of windows; what comes and goes within one does not count."""
    window_s = (points[-1][0] - points[0][0]) / _WINDOWS
    windows: dict[int, list[float]] = {}
    for at_s, value in points:
        windows.setdefault(int(at_s / window_s), []).append(value)
    hours = [(number + 0.5) * window_s / 3600 for number in windows]
    return statistics.linear_regression(hours, [statistics.median(values) for values in windows.values()]).slope


def _sample(bench: DaemonBench, began_s: float, jobs: int) -> Sample:
    folder = Path(f"/proc/{bench.daemon.process.pid}")
    found = dict(re.findall(r"^(VmRSS|RssAnon|Threads):\s+(\d+)", (folder / "status").read_text("ascii"), re.MULTILINE))
    return Sample(
        at_s=time.monotonic() - began_s,
        memory_mib=int(found["VmRSS"]) / 1024,
        heap_mib=int(found["RssAnon"]) / 1024,
        files=sum(1 for _ in (folder / "fd").iterdir()),
        threads=int(found["Threads"]),
        jobs=jobs,
        load=load(),
    )


def _measure(options: argparse.Namespace) -> Soak:
    samples: list[Sample] = []
    with open_daemon(options, gib=4, MOVER_BUFFER_MB=str(_BUFFER_MIB), MOVER_DRAIN_S="20") as bench:
        began_s = time.monotonic()
        scraped_s = told_s = 0.0
        with SoakClients(bench, options.clients, options.seed) as clients:
            while (now_s := time.monotonic() - began_s) < 60 * options.minutes and len(clients.wrong) <= 20:
                samples.append(_sample(bench, began_s, clients.jobs))
                if now_s - scraped_s >= _SCRAPE_EVERY_S:
                    scraped_s = now_s
                    bench.metrics()
                    bench.client.get("/").raise_for_status()
                if now_s - told_s >= 60:
                    told_s = now_s
                    print(_line(samples[-1]), file=sys.stderr)
                time.sleep(max(0.0, began_s + now_s + _EVERY_S - time.monotonic()))
        return Soak(samples, dict(sorted(clients.ended.items())), clients.wrong, bench.daemon.stop())


def _line(item: Sample) -> str:
    return (
        f"{item.at_s / 60:.1f} min: {item.memory_mib:.1f} MiB, {item.files} open files, {item.threads} threads, "
        f"{item.jobs} jobs, load {item.load:.1f}"
    )


def _print(soak: Soak, minutes: float) -> None:
    print("Medians (min..max) of parts of the time:")
    rows = []
    parts = 10
    for part in range(parts):
        first_s, last_s = 60 * minutes * part / parts, 60 * minutes * (part + 1) / parts
        items = [item for item in soak.samples if first_s <= item.at_s < last_s]
        if items:
            cells = (_spread([item.memory_mib for item in items]), _spread([item.heap_mib for item in items]))
            counts = (_spread([item.files for item in items]), _spread([item.threads for item in items]))
            rows.append((f"{first_s / 60:.1f} min", *cells, *counts, f"{items[-1].jobs}", f"{items[-1].load:.1f}"))
    print_table(("from", "memory, MiB", "of it heap", "open files", "threads", "jobs ended", "load"), rows)
    print()
    print_table(("jobs", "number"), [(name, f"{count}") for name, count in soak.ended.items()])
    half = soak.second_half
    hours = (half[-1].at_s - half[0].at_s) / 3600
    print(f"\nSecond half, {(half[-1].jobs - half[0].jobs) / hours:,.0f} jobs an hour:")
    print(f"  memory {soak.slope('memory_mib'):+.1f} MiB/h (allowed: {_MOST_MIB_PER_H:g})")
    print(f"  heap {soak.slope('heap_mib'):+.1f} MiB/h")
    print(f"  open files {soak.more_files_per_h:+.1f} /h at their fewest (allowed: {_MOST_FILES_PER_H:g})")
    print(f"  threads {soak.slope('threads'):+.1f} /h")


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f}..{max(values):.0f})"


def _plot(soak: Soak) -> Path:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (memory, files) = plt.subplots(2, figsize=(9, 6), sharex=True, layout="constrained")
    minutes = [item.at_s / 60 for item in soak.samples]
    memory.plot(minutes, [item.memory_mib for item in soak.samples], label="resident memory", linewidth=0.8)
    memory.plot(minutes, [item.heap_mib for item in soak.samples], label="of it heap", linewidth=0.8)
    memory.set(ylabel="MiB", title=f"memory {soak.slope('memory_mib'):+.1f} MiB/h in the second half")
    files.plot(minutes, [item.files for item in soak.samples], label="open files", linewidth=0.8)
    files.plot(minutes, [item.threads for item in soak.samples], label="threads", linewidth=0.8)
    files.set(xlabel="minutes", title=f"open files {soak.more_files_per_h:+.1f} /h at their fewest")
    for axes in (memory, files):
        axes.axvspan(minutes[-1] / 2, minutes[-1], alpha=0.08)
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(loc="lower right")
    _RESULTS.mkdir(exist_ok=True)
    path = _RESULTS / "daemon_soak.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main() -> None:
    """Prints tables, or JSON, and plots; fails when memory or open files grow, or a job ended as it should not."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_daemon_options(parser)
    parser.add_argument("--minutes", type=float, default=20.0, help="how long (default: 20)")
    parser.add_argument("--clients", type=int, default=5, help="at a time; one has large datasets (default: 5)")
    parser.add_argument("--seed", type=int, default=1, help="of the clients' choices (default: 1)")
    options = parser.parse_args()
    soak = _measure(options)
    plot = _plot(soak)
    if options.json:
        print(json.dumps(msgspec.to_builtins(soak)))
    else:
        _print(soak, options.minutes)
        print(f"\nplot: {plot}")
    missed = [f"{len(soak.wrong)} surprises, the first: {soak.wrong[0]}"] if soak.wrong else []
    if soak.exit_code:
        missed.append(f"the daemon ended with code {soak.exit_code}")
    if not soak.slope("memory_mib") <= _MOST_MIB_PER_H:
        missed.append(f"memory grows by {soak.slope('memory_mib'):.1f} MiB/h")
    if not round(soak.more_files_per_h, 1) <= _MOST_FILES_PER_H:  # a single file in 20 minutes is 6.0 or 6.01
        missed.append(f"open files grow by {soak.more_files_per_h:.1f} /h")
    if missed:
        sys.exit("; ".join(missed))


if __name__ == "__main__":
    main()
