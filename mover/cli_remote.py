"""Commands that the daemon carries out: ordered there, followed from here, told as if they had been done here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import anyio.to_thread
import msgspec

from mover.api import DatasetView, JobEvent, JobOptions, JobOrder, JobView
from mover.api_client import DaemonClient, daemon_access
from mover.api_problems import failure_error
from mover.cli_estimate import Forecast, Rates, forecast
from mover.cli_outcomes import planned, worked
from mover.cli_run import Outcome, Results, Session
from mover.errors import DaemonTransientError, MoverError, UsageError
from mover.model import Anomaly, Datablock, DatasetPlan, Member, Progress, Stage
from mover.policies.space import SpaceReading
from mover.reports import ArchiveReport, RetrieveReport, VerifyReport

if TYPE_CHECKING:
    from mover.progress import Display

__all__ = ["archive", "follow_job", "open_daemon", "plan", "refuse_here", "retrieve", "verify"]

T = TypeVar("T", ArchiveReport, RetrieveReport, VerifyReport)

_ONLY_HERE: Final = "{} is not offered by the daemon; run it on the daemon's host, without --url and MOVER_URL"
_GOES_ON: Final = (
    "no longer followed; job {0} goes on in the daemon: `mover jobs {0}` shows it, `mover jobs cancel {0}` ends it"
)
_PAYLOAD: Final = frozenset({Stage.STAGE, Stage.MOVE, Stage.VERIFY, Stage.RECALL, Stage.RETRIEVE})
_STAGES: Final = {str(stage): stage for stage in Stage}
_MEMBER: Final = Member("", 0, "", 0, 0, 0)  # in the place of each; the daemon tells how many there are


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
        else:
            told = _plan_of(dataset.report)
            space = msgspec.convert(dataset.report["space"], SpaceReading)
            percentage = session.settings.lts_free_space_percentage
            results.done[dataset.dataset_id] = (told, forecast(told, space, percentage, rates))
    return planned(results.reports, results.failures, members=False)


def _plan_of(report: dict[str, Any]) -> DatasetPlan:
    dataset_id = report["dataset_id"]
    datablocks = tuple(
        Datablock(dataset_id, item["number"], (_MEMBER,) * item["members"], item["payload_bytes"], item["size_bytes"])
        for item in report["datablocks"]
    )
    numbers = {name: report[name] for name in ("fingerprint", "file_count", "payload_bytes", "size_bytes")}
    anomalies = msgspec.convert(report["anomalies"], tuple[Anomaly, ...])
    return DatasetPlan(dataset_id, datablocks, anomalies=anomalies, **numbers)


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
    shown = _Shown(session.display)

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


class _Shown:
    """Makes the engine's events of the daemon's."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._seen: set[tuple[str, int, Stage]] = set()

    def tell(self, event: JobEvent) -> None:
        """One event of the job."""
        if event.type == "progress" and event.dataset is not None:
            self._tell_progress(event.dataset)
        elif event.transition is not None and event.transition.dataset_id and event.transition.state == "waiting":
            told = event.transition
            self._display.tell(Progress(told.dataset_id, Stage.LOCK, "waiting", reason=told.reason))

    def _tell_progress(self, view: DatasetView) -> None:
        stage = _STAGES.get(view.stage)
        if stage is None:
            return
        key = (view.dataset_id, view.datablock, stage)
        state: Literal["started", "progress", "waiting", "finished"] = "progress"
        if view.state == "waiting":
            state = "waiting"
        elif key not in self._seen:
            self._seen.add(key)
            self._display.tell(Progress(view.dataset_id, stage, "started", view.datablock, 0, view.total_bytes))
        if state == "progress" and view.done_bytes == view.total_bytes and stage in _PAYLOAD:
            state = "finished"
        amounts = (view.done_bytes, view.total_bytes)
        self._display.tell(Progress(view.dataset_id, stage, state, view.datablock, *amounts, view.reason))


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
