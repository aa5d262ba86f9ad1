"""The commands about the daemon itself: its jobs and its limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from mover.api import JobState, JobView, LimitsChange, LimitView, is_final
from mover.api_problems import failure_error
from mover.cli_remote import follow_job, open_daemon
from mover.cli_run import Outcome, Session
from mover.cli_tables import print_table
from mover.errors import ExitCode, UsageError
from mover.shown import bytes_text, shown_name

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["JOB_STATES", "jobs", "limits"]

JOB_STATES: Final[tuple[JobState, ...]] = ("queued", "waiting", "running", "done", "failed", "cancelled")
"""The states that a listing can be narrowed to."""

_FORM: Final = "limits are changed as NAME=N with N from 1 to 1,024 and NAME one of "
_WORDS: Final = "`mover jobs`, `mover jobs ID` or `mover jobs cancel ID`"
_STATE: Final = "--state is one of " + ", ".join(JOB_STATES)


async def jobs(session: Session, words: Sequence[str], *, state: str, owner: str, limit: int, follow: bool) -> Outcome:
    """Lists jobs, shows or follows one, or cancels one.  Raises UsageError."""
    match list(words):
        case []:
            return await _list(session, state, owner, limit)
        case ["cancel", job_id]:
            async with open_daemon(session) as client:
                return _one(await client.cancel(job_id))
        case [job_id] if job_id != "cancel":
            async with open_daemon(session) as client:
                job = await (follow_job(session, client, job_id) if follow else client.job(job_id))
                return _one(job, judged=follow)
    raise UsageError(_WORDS)


async def _list(session: Session, state: str, owner: str, limit: int) -> Outcome:
    wanted: JobState | None = next((item for item in JOB_STATES if item == state), None)
    if state and wanted is None:
        raise UsageError(_STATE)
    async with open_daemon(session) as client:
        found = [job async for job in client.jobs(state=wanted, owner=owner or None, limit=limit)]

    def show(console: Console) -> None:
        columns = ("job", "kind", "state", "owner", ">datasets", ">done", "accepted", "reason")
        print_table(console, "", columns, (_row(job) for job in found))

    return Outcome({"jobs": found}, show)


def _row(job: JobView) -> tuple[str, ...]:
    done = sum(dataset.state == "done" for dataset in job.datasets)
    numbers = (f"{len(job.datasets):,}", f"{done:,}")
    return (job.id, job.kind, job.state, shown_name(job.owner), *numbers, job.accepted_at, shown_name(job.reason))


def _one(job: JobView, *, judged: bool = False) -> Outcome:
    """``judged``: the exit code says how the job ended."""

    def show(console: Console) -> None:
        reason = f" ({shown_name(job.reason)})" if job.reason else ""
        console.print(f"job {job.id}: {job.kind} for {shown_name(job.owner)}, {job.state}{reason}", soft_wrap=True)
        columns = ("dataset", "state", ">attempt", "stage", ">done", ">of", "reason")
        rows = (
            (
                shown_name(item.dataset_id),
                item.state,
                str(item.attempt),
                item.stage,
                bytes_text(item.done_bytes) if item.total_bytes else "",
                bytes_text(item.total_bytes) if item.total_bytes else "",
                shown_name(item.failure.message if item.failure else item.reason),
            )
            for item in job.datasets
        )
        print_table(console, "", columns, rows)
        for change in job.transitions:
            what = shown_name(change.dataset_id) if change.dataset_id else "the job"
            console.print(f"  {change.at} {what}: {change.state} {shown_name(change.reason)}".rstrip(), soft_wrap=True)

    failed = [item for item in job.datasets if judged and is_final(item.state) and item.state != "done"]
    return Outcome({"job": job}, show, tuple((item.dataset_id, failure_error(item)) for item in failed))


async def limits(session: Session, assignments: Sequence[str]) -> Outcome:
    """Shows the limits, after changing those that are named.  Raises UsageError."""
    change = _change(assignments)
    async with open_daemon(session) as client:
        found = await (client.set_limits(change) if assignments else client.limits())

    def show(console: Console) -> None:
        print_table(
            console, "", ("limit", ">slots", ">held", ">waiting", "holders"), (_limit_row(item) for item in found)
        )

    return Outcome({"limits": found}, show, exit_code=ExitCode.DONE)


def _limit_row(item: LimitView) -> tuple[str, ...]:
    holders = ", ".join(shown_name(holder) for holder in item.holders)
    return (item.name, f"{item.slots:,}", f"{len(item.holders):,}", f"{item.waiting:,}", holders)


def _change(assignments: Sequence[str]) -> LimitsChange:
    given: dict[str, Any] = {}
    for assignment in assignments:
        name, _, number = assignment.partition("=")
        given[name.upper()] = int(number) if number.isdecimal() and len(number) <= 9 else number
    try:
        return msgspec.convert(given, LimitsChange)
    except msgspec.ValidationError as error:
        raise UsageError(_FORM + ", ".join(LimitsChange.__struct_fields__)) from error
