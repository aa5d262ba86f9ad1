"""Peak memory of archiving (and retrieving) above what the imports take, each dataset in a process of its own.

Measured from outside: the kernel's high-water mark of the process (VmHWM), read once after the imports and once at the
end. The datasets that count have the same bound, whatever the number and the size of their objects.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import IO

import anyio
import msgspec

from benchmarks.support import (
    DATASET,
    KIB,
    MIB,
    Server,
    Shape,
    add_server_options,
    engine_config,
    fresh_folder,
    open_engine,
    open_server,
    print_table,
    uploaded,
)

__all__ = ["main"]

_LIMIT_MIB = 160
_BUFFER_BYTES = 64 * MIB
_SHAPES = (
    Shape("100 x 1 MiB", 100, MIB),
    Shape("50,000 x 1 KiB", 50_000, KIB),
    Shape("20,001 x 1 KiB", 20_001, KIB),
    Shape("1 x 4 GiB", 1, 4096 * MIB),
)


class Job(msgspec.Struct, frozen=True):
    """What a child process does: ``archive`` or ``retrieve``."""

    work: str
    server: Server
    bucket: str
    folder: str


class Result(msgspec.Struct, frozen=True):
    """What a child process did."""

    datablocks: int
    files: int
    elapsed_s: float


class Row(msgspec.Struct, frozen=True):
    """One measurement."""

    name: str
    work: str
    files: int
    datablocks: int
    elapsed_s: float
    imports_mib: float
    peak_mib: float

    @property
    def above_mib(self) -> float:
        """What counts."""
        return self.peak_mib - self.imports_mib


async def _work(job: Job) -> Result:
    config = engine_config(job.server, job.bucket, Path(job.folder), buffer_bytes=_BUFFER_BYTES)
    async with open_engine(config) as engine:
        if job.work == "archive":
            report = await engine.archive(DATASET)
            return Result(len(report.datablocks), report.file_count, report.elapsed_s)
        retrieved = await engine.retrieve(DATASET)
        return Result(len(retrieved.objects), len(retrieved.objects), retrieved.elapsed_s)


def _child() -> None:
    """Imports are done; now waits for the parent at both marks."""
    print("imported", flush=True)
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    result = anyio.run(_work, job, backend_options={"use_uvloop": True})
    print(msgspec.json.encode(result).decode(), flush=True)
    sys.stdin.buffer.readline()


def _high_water_mib(pid: int) -> float:
    match = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(encoding="ascii"), re.MULTILINE)
    return int(match[1]) / 1024 if match else 0.0


def _measure(name: str, job: Job) -> Row:
    command = [sys.executable, "-m", "benchmarks.memory", "--child"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        stdin, stdout = _pipes(process)
        stdout.readline()
        imports_mib = _high_water_mib(process.pid)
        stdin.write(msgspec.json.encode(job) + b"\n")
        stdin.flush()
        answer = stdout.readline()
        peak_mib = _high_water_mib(process.pid)
    if not answer:
        sys.exit(f"{name}: the {job.work} failed")
    result = msgspec.json.decode(answer, type=Result)
    row = Row(name, job.work, result.files, result.datablocks, result.elapsed_s, imports_mib, peak_mib)
    print(f"{name}, {job.work}: {row.above_mib:.0f} MiB above the imports", file=sys.stderr)
    return row


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    if process.stdin is None or process.stdout is None:
        raise AssertionError
    return process.stdin, process.stdout


def _rows(server: Server, shape: Shape, options: argparse.Namespace) -> list[Row]:
    with uploaded(server, shape) as bucket, fresh_folder(options.target) as folder:
        works = ["archive", "retrieve"] if options.retrieve else ["archive"]
        return [_measure(shape.name, Job(work, server, bucket, str(folder))) for work in works]


def _print(rows: list[Row]) -> None:
    header = ("MOVER_BUFFER_MB=64", "", "files", "datablocks", "seconds", "imports MiB", "peak MiB", "above MiB")
    cells = []
    for row in rows:
        sizes = (f"{size:.0f}" for size in (row.imports_mib, row.peak_mib, row.above_mib))
        cells.append((row.name, row.work, f"{row.files:,}", f"{row.datablocks}", f"{row.elapsed_s:.1f}", *sizes))
    print_table(header, cells)


def main() -> None:
    """Prints a table, or JSON; fails when a dataset takes more memory than allowed."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_server_options(parser)
    parser.add_argument("--target", default="/var/tmp", help="file system of the LTS (default: /var/tmp)")
    parser.add_argument("--only", metavar="TEXT", default="", help="datasets whose name contains it")
    parser.add_argument("--retrieve", action="store_true", help="retrieve each dataset, too")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child()
        return
    rows: list[Row] = []
    with open_server(options, gib=10 if options.retrieve else 6) as server:
        for shape in _SHAPES:
            if options.only in shape.name:
                rows += _rows(server, shape, options)
    if options.json:
        print(json.dumps([msgspec.to_builtins(row) | {"above_mib": row.above_mib} for row in rows]))
    else:
        _print(rows)
    if high := [f"{row.name} ({row.work})" for row in rows if row.above_mib > _LIMIT_MIB]:
        sys.exit(f"more than {_LIMIT_MIB} MiB above the imports: {', '.join(high)}")


if __name__ == "__main__":
    main()
