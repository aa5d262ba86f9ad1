"""Commands that the daemon carries out: ordered there, followed from here, told as if they had been done here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Final, Literal, TypeVar

import anyio.to_thread
import msgspec

from mover.api import JobOptions, JobOrder, JobView
from mover.api_client import DaemonClient, daemon_access
from mover.api_engine import ProgressTeller, plan_of
from mover.api_problems import failure_error
from mover.cli_estimate import Forecast, Rates, forecast
from mover.cli_outcomes import planned, worked
from mover.cli_run import Outcome, Results, Session
from mover.errors import DaemonTransientError, LtsError, MoverError, UsageError
from mover.model import DatasetPlan
from mover.policies.space import SpaceReading
from mover.reports import ArchiveReport, RetrieveReport, VerifyReport

__all__ = ["archive", "follow_job", "open_daemon", "plan", "refuse_here", "retrieve", "verify"]

T = TypeVar("T", ArchiveReport, RetrieveReport, VerifyReport)

_ONLY_HERE: Final = "{} is not offered by the daemon; run it on the daemon's host, without --url and MOVER_URL"
_GOES_ON: Final = (
    "no longer followed; job {0} goes on in the daemon: `mover jobs {0}` shows it, `mover jobs cancel {0}` ends it"
)


def refuse_here(what: str) -> None:
    """For what the daemon does not offer.  Raises UsageError."""
    raise UsageError(_ONLY_HERE.format(what))


@asynccontextmanager
async def open_daemon(session: Session) -> AsyncIterator[DaemonClient]:
    """The client of the command's daemon.  Raises ConfigError."""
    token_file = session.settings.mover_token_file
    access = await anyio.to_thread.run_sync(daemon_access, session.daemon_url, token_file)
    async with DaemonClient.open(access) as client:
        yield client


async def archive(session: Session, dataset_ids: Sequence[str], *, release_source: bool) -> Outcome:
    """Archives datasets in the daemon."""
    order = JobOrder("archive", _each_once(dataset_ids), JobOptions(release_source=release_source))
    results, notes = _reports(await _run(session, order), ArchiveReport)
    return worked(results.reports, results.failures, "archived", notes)


async def verify(
    session: Session, dataset_ids: Sequence[str], level: Literal["written", "read-back", "recalled"]
) -> Outcome:
    """Compares datablocks with their manifests, in the daemon."""
    order = JobOrder("verify", _each_once(dataset_ids), JobOptions(level=level))
    results, notes = _reports(await _run(session, order), VerifyReport)
    return worked(results.reports, results.failures, "verified", notes)


async def retrieve(
    session: Session, dataset_id: str, *, files: Sequence[str], form: Literal["datablocks", "files"]
) -> RetrieveReport:
    """Brings a dataset back by the daemon.  Raises MoverError."""
    order = JobOrder("retrieve", (dataset_id,), JobOptions(files=tuple(files), form=form))
    results, notes = _reports(await _run(session, order), RetrieveReport)
    for _, error in results.failures:
        raise error
    for note in notes:
        session.display.note(note)
    return results.reports[0]


async def plan(session: Session, dataset_ids: Sequence[str], rates: Rates) -> Outcome:
    """What archiving would write, as the daemon sees it."""
    job = await _run(session, JobOrder("plan", _each_once(dataset_ids)))
    results: Results[tuple[DatasetPlan, Forecast]] = Results([dataset.dataset_id for dataset in job.datasets])
    for dataset in job.datasets:
        if dataset.report is None:
            results.failed[dataset.dataset_id] = failure_error(dataset)
        elif dataset.report["space"] is None:
            reason = "it does not answer the daemon, so nobody knows what is free there"
            results.failed[dataset.dataset_id] = LtsError("stat", "the LTS", reason)
        else:
            told = plan_of(dataset.report)
            space = msgspec.convert(dataset.report["space"], SpaceReading)
            # The daemon's; one that does not tell is older than this command.
            percentage = dataset.report.get("floor_percentage", session.settings.lts_free_space_percentage)
            results.done[dataset.dataset_id] = (told, forecast(told, space, percentage, rates))
    return planned(results.reports, results.failures, members=False)


async def _run(session: Session, order: JobOrder) -> JobView:
    async with open_daemon(session) as client:
        job = await client.submit(order)
        session.display.note(f"job {job.id} in the daemon")
        return await follow_job(session, client, job.id)


async def follow_job(session: Session, client: DaemonClient, job_id: str) -> JobView:
    """The job at its end, with its reports; its progress is shown until then.

    Raises:
        MoverError: the daemon stays away, or knows no such job; the job goes on, if there is one.
    """
    session.on_interrupt = _GOES_ON.format(job_id)
    shown = ProgressTeller(session.display.tell)

    def on_pause(error: MoverError) -> None:
        session.display.note(f"{error}; trying to follow the job again")

    try:
        async with aclosing(client.follow(job_id, on_pause=on_pause)) as events:
            async for event in events:
                shown.tell(event)
        return await client.result(await client.job(job_id))
    except DaemonTransientError as error:
        error.add_note(session.on_interrupt)
        raise


def _reports(job: JobView, kind: type[T]) -> tuple[Results[T], list[str]]:
    """Reports and failures of the datasets, and what the daemon left out of reports that were too long."""
    results: Results[T] = Results([dataset.dataset_id for dataset in job.datasets])
    notes = []
    for dataset in job.datasets:
        if dataset.state != "done" or dataset.report is None:
            results.failed[dataset.dataset_id] = failure_error(dataset)
            continue
        results.done[dataset.dataset_id] = msgspec.convert(dataset.report, kind)
        for name, number in dataset.report.get("left_out", {}).items():
            notes.append(f"{dataset.dataset_id}: the daemon left out {number:,} of {name}; too long")
    return results, notes


def _each_once(dataset_ids: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(dataset_ids))
