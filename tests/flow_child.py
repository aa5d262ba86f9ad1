"""A flow run in a process of its own: ``python -m tests.flow_child archive <job id>``, or ``retrieve``."""

from __future__ import annotations

import sys

import anyio

from flows.archive import archive_datasetlist
from flows.retrieve import retrieve_datasetlist

__all__ = ["main"]


async def _run(kind: str, job_id: str) -> bool:
    run = archive_datasetlist if kind == "archive" else retrieve_datasetlist
    state = await run(job_id, return_state=True)
    return bool(state.is_completed())


def main() -> int:
    """The exit code: 0 when the run has completed."""
    return 0 if anyio.run(_run, sys.argv[1], sys.argv[2]) else 1


if __name__ == "__main__":
    sys.exit(main())
