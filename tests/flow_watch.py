"""Flow runs in processes of their own, watched from outside: the files that they have open, the slots on the server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

from tests.flow_world import FlowWorld

__all__ = ["FlowWatch", "flow_processes"]

_FILES_EVERY_S = 0.02
_SLOTS_EVERY_S = 0.1  # each look costs the server some 20 ms
_ROOT = Path(__file__).parent.parent
_WRITTEN = re.compile(r"\.tar\.[0-9a-f]{16}\.part$")
_Open = tuple[str, int, str]  # what for, process, path


@contextmanager
def flow_processes(
    world: FlowWorld, kind: str, job_ids: Sequence[str], **environ: str
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A process for each job, all at a time; what is left of them is killed at the end of the block."""
    with ExitStack() as stack:
        processes = []
        for job_id in job_ids:
            log = stack.enter_context((world.lts.parent / f"run-{job_id}.log").open("wb"))  # pytest keeps the folder
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.flow_child", kind, job_id],
                cwd=_ROOT,
                env={**world.environ, **environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        yield processes


class FlowWatch:
    """Looks at processes every 20 ms and at the server's limits every 0.1 s, in threads, while the block runs.

    A datablock counts as written or read while a process has its file open, for the one or the other, in two looks in
    a row: then it was open at the instant between them, as all others that count then.
    """

    def __init__(self, world: FlowWorld, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self._world, self._ids = world, [process.pid for process in processes]
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._watch_files), threading.Thread(target=self._watch_slots)]
        self.files: Counter[str] = Counter()
        """Most datablocks that were ``written`` and ``read`` at a time."""
        self.slots: Counter[str] = Counter()
        """Most slots that were taken of each limit."""
        self.looks = 0

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _watch_files(self) -> None:
        before: set[_Open] = set()
        while not self._stop.wait(_FILES_EVERY_S):
            now = {found for process_id in self._ids for found in _open_datablocks(process_id, self._world.lts)}
            self.files |= Counter(use for use, _, _ in before & now)
            before = now
            self.looks += 1

    def _watch_slots(self) -> None:
        from flows.limits import LIMIT_TAGS, limit_name

        names = {limit_name(tag): name for name, tag in LIMIT_TAGS.items()}
        with self._world.client() as client:
            while not self._stop.wait(_SLOTS_EVERY_S):
                for limit in client.read_global_concurrency_limits(limit=200):
                    if limit.name in names:
                        self.slots |= Counter({names[limit.name]: limit.active_slots})


def _open_datablocks(process_id: int, lts: Path) -> Iterator[_Open]:
    folder = Path("/proc", str(process_id))
    try:
        numbers = os.listdir(folder / "fd")  # noqa: PTH208 - fifty times a second
    except OSError:  # it has ended
        return
    for number in numbers:
        try:
            path = os.readlink(folder / "fd" / number)  # noqa: PTH115
            if not path.startswith(str(lts)):
                continue
            if _WRITTEN.search(path):
                yield "written", process_id, path
            elif path.endswith(".tar") and _for_reading(folder / "fdinfo" / number):
                yield "read", process_id, path
        except OSError:  # closed meanwhile
            continue


def _for_reading(info: Path) -> bool:
    flags = next(line.split()[1] for line in info.read_text().splitlines() if line.startswith("flags:"))
    return int(flags, 8) & os.O_ACCMODE == os.O_RDONLY
