"""Rate of archiving beside ``s5cmd cp`` to a folder of the same file system, which neither packs nor hashes.

``move``: from the first step of moving to the last datablock that has its final name. ``archive``: everything, from the
listing to the manifests, the read-back included. Contenders take turns in every round; ratios are made per round.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import msgspec

from benchmarks.support import (
    DATASET,
    MIB,
    Server,
    Shape,
    add_server_options,
    engine_config,
    fresh_folder,
    open_engine,
    open_server,
    print_table,
    program,
    s5cmd,
    spread,
    uploaded,
)
from mover.model import Progress, Stage, raw_files_prefix

__all__ = ["main"]

_LARGE = Shape("large", 4, 512 * MIB)
_SMALL = Shape("small", 2000, 100_000)
_ONE_DATABLOCK_BYTES = 4096 * MIB


class Sample(msgspec.Struct, frozen=True):
    """One contender in one round. ``cpu_s`` is the client's, user and system, of the same span as ``move_s``."""

    move_s: float
    cpu_s: float
    archive_s: float = 0.0


class Job(msgspec.Struct, frozen=True):
    """What a child process archives."""

    server: Server
    bucket: str
    folder: str
    fields: dict[str, int]


Contender = Callable[[Server, str, Path], Sample]


def _cpu_s(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def _mover(**fields: int) -> Contender:
    def measure(server: Server, bucket: str, folder: Path) -> Sample:
        job = msgspec.json.encode(Job(server, bucket, str(folder), fields))
        command = [sys.executable, "-m", "benchmarks.rate", "--child"]
        done = subprocess.run(command, input=job, check=True, stdout=subprocess.PIPE)
        return msgspec.json.decode(done.stdout, type=Sample)

    return measure


async def _archive(job: Job) -> Sample:
    marks: list[tuple[float, float]] = []

    def tell(progress: Progress) -> None:
        if progress.stage is Stage.MOVE and progress.state in {"started", "finished"}:
            marks.append((time.perf_counter(), _cpu_s(resource.RUSAGE_SELF)))

    config = engine_config(job.server, job.bucket, Path(job.folder), **job.fields)
    async with open_engine(config, tell) as engine:
        report = await engine.archive(DATASET)
    # The stage ends right before the rename of a datablock: the report's time has it, where there is one datablock.
    span_s = report.datablocks[0].move_s if len(report.datablocks) == 1 else marks[-1][0] - marks[0][0]
    return Sample(span_s, marks[-1][1] - marks[0][1], report.elapsed_s)


def _timed(call: Callable[[], object]) -> Sample:
    began, cpu_s = time.perf_counter(), _cpu_s(resource.RUSAGE_CHILDREN)
    call()
    return Sample(time.perf_counter() - began, _cpu_s(resource.RUSAGE_CHILDREN) - cpu_s)


def _s5cmd(server: Server, bucket: str, folder: Path) -> Sample:
    source = f"s3://{bucket}/{raw_files_prefix(DATASET)}*"
    return _timed(lambda: s5cmd(server, "cp", source, f"{folder}/copy/"))


def _rclone(server: Server, bucket: str, folder: Path) -> Sample:
    keys = f"access_key_id={server.access_key},secret_access_key={server.secret_key}"
    remote = f":s3,provider=Ceph,endpoint='{server.endpoint_url}',{keys}:{bucket}/{raw_files_prefix(DATASET)}"
    command = [program("rclone"), "--config", "", "copy", "--transfers", "16", remote, str(folder / "copy")]
    return _timed(lambda: subprocess.run(command, check=True, stderr=subprocess.DEVNULL))


def _contenders(shape: Shape, options: argparse.Namespace) -> dict[str, Contender]:
    one = {"target_bytes": _ONE_DATABLOCK_BYTES}
    found: dict[str, Contender] = {"mover, one datablock": _mover(**one)}
    if options.sweep_concurrency:
        swept = ("s3_concurrency", (8, 16, 32, 64)) if shape is _SMALL else ("streams", (2, 4, 8, 16))
        found = {f"mover, {swept[0]} {value}": _mover(**one, **{swept[0]: value}) for value in swept[1]}
    elif shape is _LARGE:
        found["mover, 4 datablocks"] = _mover()
    found["s5cmd cp"] = _s5cmd
    if options.rclone:
        found["rclone copy"] = _rclone
    return found


def _measure(server: Server, shape: Shape, options: argparse.Namespace) -> dict[str, list[Sample]]:
    contenders = _contenders(shape, options)
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    with uploaded(server, shape) as bucket:
        for number in range(options.rounds + 1):
            for name, contender in contenders.items():
                with fresh_folder(options.target) as folder:
                    sample = contender(server, bucket, folder)
                if number:  # the first round warms the server up
                    samples[name].append(sample)
    return samples


def _ratios(samples: dict[str, list[Sample]], name: str) -> list[float]:
    """How much quicker than ``s5cmd cp`` in the same round."""
    return [theirs.move_s / ours.move_s for ours, theirs in zip(samples[name], samples["s5cmd cp"], strict=True)]


def _print(shape: Shape, samples: dict[str, list[Sample]]) -> None:
    print(f"{shape.objects:,} objects of {shape.size_bytes:,} bytes, median (min..max) of each column:")
    rows = []
    for name, items in samples.items():
        archive = [shape.total_bytes / item.archive_s / 1e9 for item in items if item.archive_s]
        rows.append(
            (
                name,
                spread([shape.total_bytes / item.move_s / 1e9 for item in items]),
                spread([shape.objects / item.move_s for item in items], 0),
                spread(_ratios(samples, name)),
                spread([item.cpu_s for item in items]),
                spread(archive) if archive else "-",
            )
        )
    print_table(("", "move GB/s", "objects/s", "of s5cmd", "client CPU s", "archive GB/s"), rows)
    print()


def main() -> None:
    """Prints a table for each shape, or JSON; fails when moving is slower than ``s5cmd cp``."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_server_options(parser)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count; one more warms up (default: 5)")
    parser.add_argument("--target", default="/dev/shm", help="file system of LTS and copies (default: /dev/shm)")
    parser.add_argument("--shape", choices=("large", "small"), help="one of the two (default: both)")
    parser.add_argument("--rclone", action="store_true", help="measure `rclone copy`, too")
    parser.add_argument("--sweep-concurrency", action="store_true", help="several values of s3_concurrency and streams")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
        sample = anyio.run(_archive, job, backend_options={"use_uvloop": True})
        sys.stdout.buffer.write(msgspec.json.encode(sample))
        return
    shapes = [shape for shape in (_LARGE, _SMALL) if options.shape in {None, shape.name}]
    results: dict[str, dict[str, list[Sample]]] = {}
    with open_server(options, gib=4) as server:
        for shape in shapes:
            results[shape.name] = _measure(server, shape, options)
            if not options.json:
                _print(shape, results[shape.name])
    if options.json:
        print(json.dumps(msgspec.to_builtins(results)))
    slow = [name for name, samples in results.items() if statistics.median(_ratios(samples, next(iter(samples)))) < 1]
    if slow and not options.sweep_concurrency:
        sys.exit(f"slower than s5cmd: {', '.join(slow)} objects")


if __name__ == "__main__":
    main()
