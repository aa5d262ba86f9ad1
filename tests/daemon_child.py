"""Job services in processes to be killed: ``python -m tests.daemon_child`` imports once and forks for every line.

It takes a ``Life`` as JSON a line and answers with the process id; an empty line waits for that process. Each process
orders all the jobs, under their keys, and notes in a file what was accepted and which datasets it began.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import anyio
import msgspec

from mover.api import JobOrder
from mover.daemon_book import Item
from mover.daemon_events import ProgressRelay
from mover.daemon_jobs import JobService, JobServiceConfig
from mover.daemon_runner import EngineRunner, Result
from mover.engine import Engine, EngineConfig

__all__ = ["Life", "Note"]


class Life(msgspec.Struct, frozen=True):
    """What one process does: jobs by their keys; it ends by itself once all have ended."""

    engine: EngineConfig
    jobs: JobServiceConfig
    orders: dict[str, JobOrder]
    notes: Path
    stderr: Path


class Note(msgspec.Struct, frozen=True):
    """What a process has to say, after it happened (``accepted``: key and id) or before (``begins``: dataset)."""

    pid: int
    what: str
    name: str = ""
    job_id: str = ""


class _Noting:
    def __init__(self, engine: Engine, descriptor: int) -> None:
        self._real, self._descriptor = EngineRunner(engine, 1 << 20), descriptor

    async def run(self, item: Item) -> Result:
        note(self._descriptor, "begins", item.dataset_id, item.job.row.id)
        return await self._real.run(item)


def note(descriptor: int, what: str, name: str = "", job_id: str = "") -> None:
    """One line, written at once."""
    os.write(descriptor, msgspec.json.encode(Note(os.getpid(), what, name, job_id)) + b"\n")


async def _live(life: Life) -> None:
    descriptor = os.open(life.notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    relay = ProgressRelay()
    async with (
        Engine.open(life.engine, tell=relay.tell) as engine,
        JobService.open(engine, life.jobs, progress=relay, runner=_Noting(engine, descriptor)) as service,
    ):
        note(descriptor, "up")
        ids = []
        for key, order in life.orders.items():
            job, _ = await service.submit(order, owner=key[:1], key=key)
            note(descriptor, "accepted", key, job.id)
            ids.append(job.id)
        for job_id in ids:
            async for _ in service.events(job_id):
                pass
    note(descriptor, "through")


def _run(life: Life) -> NoReturn:
    code = 70
    try:
        opened = os.open(life.stderr, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.dup2(opened, 2)
        anyio.run(_live, life, backend_options={"use_uvloop": True})
        code = 0
    except BaseException:  # noqa: BLE001 - shown by the test
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _serve() -> None:
    import uvloop  # noqa: F401 - so that every process has it

    pid = 0
    while line := sys.stdin.buffer.readline():
        if line.strip():
            pid = os.fork()
            if not pid:
                _run(msgspec.json.decode(line, type=Life, dec_hook=lambda kind, text: kind(text)))
            answer = pid
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
