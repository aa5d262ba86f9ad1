"""What to do about a job whose runs may be gone: leave it, start a run for it, or end it. Decides, and does nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import msgspec

__all__ = ["ATTEMPTS", "End", "Leave", "RunFate", "Start", "Step", "next_step"]

RunFate = Literal["live", "cancelled", "crashed", "failed", "completed"]
"""How a run of the job stands. ``live``: it waits, runs or is being ended; the others have ended."""

ATTEMPTS: Final = 3
"""Runs that a job gets without anybody asking: what fails so often needs a person."""


class Leave(msgspec.Struct, frozen=True):
    """Nothing to do, and why."""

    reason: str


class Start(msgspec.Struct, frozen=True):
    """A run has to be started, the job's ``attempt``-th (from 1)."""

    attempt: int
    reason: str


class End(msgspec.Struct, frozen=True):
    """The job is over: its datasets get ``state``, people read ``message``."""

    state: Literal["cancelled", "system-error"]
    message: str


Step = Leave | Start | End


def next_step(*, finished: bool, fates: Sequence[RunFate], attempts: int = ATTEMPTS) -> Step:
    """What the job needs.

    Args:
        finished: the catalogue says that the job has ended.
        fates: how its runs stand, oldest first; none: it was never triggered.
        attempts: runs that it gets at most.
    """
    if finished:
        return Leave("it has ended")
    if "live" in fates:
        return Leave("a run is at it")
    if not fates:
        return Start(1, "it was never triggered")
    if fates[-1] == "cancelled":
        return End("cancelled", "an administrator cancelled the run; the job can be ordered again")
    tries = sum(fate != "cancelled" for fate in fates)
    if tries < attempts:
        return Start(tries + 1, f"its last run {_ENDS[fates[-1]]}")
    return End("system-error", f"the archive system failed {tries} times, the last run {_ENDS[fates[-1]]}")


_ENDS: Final[dict[RunFate, str]] = {
    "crashed": "was killed",
    "failed": "failed",
    "completed": "ended without telling the catalogue",
}
