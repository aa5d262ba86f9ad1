"""Memory and time of planning a large dataset: one process for each size, its listing made as it is read."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import anyio

from mover.model import CatalogueFile, SourceObject
from mover.plan import plan_dataset

__all__ = ["main"]

_MIB = 1 << 20
_LIMIT_MIB = 600


def _path(number: int) -> str:
    return f"grid_{number // 10_000:04d}/tile_{number // 100 % 100:03d}/FoilHole_{number:09d}_fractions.tiff"


async def _listing(count: int, *, shuffled: bool) -> AsyncIterator[SourceObject]:
    for position in range(count):
        number = position * 7_919 % count if shuffled else position
        yield SourceObject(_path(number), 1_000 + number % 5_000_000, f"{number:032x}", 1_700_000_000 + number)


async def _list(count: int) -> AsyncIterator[CatalogueFile]:
    for number in range(count):
        yield CatalogueFile(_path(number), 1_000 + number % 5_000_000, 1_600_000_000 + number)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _MIB


async def _measure(count: int, *, catalogue: bool, shuffled: bool) -> dict[str, float]:
    before, begin = _peak_mib(), time.perf_counter()
    listed = _list(count) if catalogue else None
    objects = _listing(count, shuffled=shuffled)
    plan = await plan_dataset("bench/1", objects, target_bytes=200 * _MIB, listed_files=listed, where="memory")
    seconds = time.perf_counter() - begin
    if plan.file_count != count:
        sys.exit(f"planned {plan.file_count} of {count} objects")
    return {
        "objects": count,
        "datablocks": len(plan.datablocks),
        "seconds": round(seconds, 2),
        "us_per_object": round(seconds / count * 1e6, 2),
        "baseline_mib": round(before, 1),
        "peak_mib": round(_peak_mib(), 1),
    }


def _in_child(count: int, flags: list[str]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.plan_memory", "--child", "--objects", str(count), *flags]
    result: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return result


def main() -> None:
    """Prints a table, or JSON; fails when the largest listing takes more memory than allowed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--objects", type=int, default=1_000_000, help="size of the largest listing (default: 1,000,000)"
    )
    parser.add_argument("--catalogue", action="store_true", help="compare with a catalogue's list of as many files")
    parser.add_argument("--shuffled", action="store_true", help="list the objects out of order")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measured = anyio.run(lambda: _measure(options.objects, catalogue=options.catalogue, shuffled=options.shuffled))
        print(json.dumps(measured))
        return
    flags = [f"--{name}" for name in ("catalogue", "shuffled") if getattr(options, name)]
    rows = [_in_child(options.objects // part, flags) for part in (4, 2, 1)]
    if options.json:
        print(json.dumps({"limit_mib": _LIMIT_MIB, "rows": rows}))
    else:
        print("".join(f"{name:>15}" for name in rows[0]))
        for row in rows:
            print("".join(f"{value:>15,}" for value in row.values()))
    if rows[-1]["peak_mib"] > _LIMIT_MIB:
        sys.exit(f"peak memory is above {_LIMIT_MIB} MiB")


if __name__ == "__main__":
    main()
