"""An engine that is elsewhere: the calls of the real one, done by a daemon, with its reports and its failures."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from hashlib import sha256
from typing import Any, Final, Literal

import anyio
import msgspec

from mover.api import DatasetView, JobEvent, JobOptions, JobOrder, JobView, is_final
from mover.api_client import DaemonClient
from mover.api_problems import failure_error
from mover.errors import MoverError, OrderRefusedError
from mover.model import Anomaly, Datablock, DatasetPlan, Member, Progress, Stage
from mover.reports import ArchiveReport, DatasetListing, RetrieveReport, VerifyReport

__all__ = ["ProgressTeller", "RemoteEngine", "plan_of"]

_log = logging.getLogger(__name__)

_NO_LISTING: Final = "the daemon does not list all that is on the LTS; ask on its host, with `mover ls`"
_PAYLOAD: Final = frozenset({Stage.STAGE, Stage.MOVE, Stage.VERIFY, Stage.RECALL, Stage.RETRIEVE})
_STAGES: Final = {str(stage): stage for stage in Stage}
_MEMBER: Final = Member("", 0, "", 0, 0, 0)  # in the place of each; the daemon tells how many there are
_TRIES: Final = 100  # orders of one call under keys of their own; the caller gives up long before
_CANCEL_S: Final = 10.0


class RemoteEngine:
    """Archives, retrieves, verifies and plans in a daemon.

    A call is a job of the daemon. The same call in the same ``run`` finds the job that is under way, or is done, and
    orders a new one only after a failure. A call that is cancelled cancels its job; one whose process is killed does
    not. ``tell`` is told the progress. ``registered``: archivals are refused by a daemon that registers datablocks
    nowhere, for callers who take what is archived for registered.
    """

    def __init__(
        self,
        client: DaemonClient,
        *,
        run: str,
        tell: Callable[[Progress], None] = lambda _: None,
        registered: bool = False,
    ) -> None:
        self._client, self._run, self._registered = client, run, registered
        self._teller = ProgressTeller(tell)

    async def plan(self, dataset_id: str) -> DatasetPlan:
        """What archiving would write; members are counted, and not named.  Raises MoverError."""
        return plan_of(await self._report(JobOrder("plan", (dataset_id,))))

    async def archive(self, dataset_id: str, *, release_source: bool = False) -> ArchiveReport:
        """Archives one dataset.  Raises MoverError."""
        options = JobOptions(release_source=release_source, registered=self._registered)
        order = JobOrder("archive", (dataset_id,), options)
        return msgspec.convert(await self._report(order), ArchiveReport)

    async def verify(
        self, dataset_id: str, *, level: Literal["written", "read-back", "recalled"] = "read-back"
    ) -> VerifyReport:
        """Compares the datablocks with their manifests.  Raises MoverError."""
        order = JobOrder("verify", (dataset_id,), JobOptions(level=level))
        return msgspec.convert(await self._report(order), VerifyReport)

    async def retrieve(
        self, dataset_id: str, *, files: Sequence[str] = (), form: Literal["datablocks", "files"] = "datablocks"
    ) -> RetrieveReport:
        """Brings a dataset, or files of it, back to the retrieval bucket.  Raises MoverError."""
        order = JobOrder("retrieve", (dataset_id,), JobOptions(files=tuple(files), form=form))
        return msgspec.convert(await self._report(order), RetrieveReport)

    async def datasets(self, dataset_id: str | None = None) -> AsyncIterator[DatasetListing]:
        """The dataset that is named, without the time of its archival.

        Raises:
            DatasetNotFoundError: it has no manifests.
            OrderRefusedError: none is named; the daemon has no such call.
        """
        if dataset_id is None:
            raise OrderRefusedError(_NO_LISTING)
        report = await self.verify(dataset_id, level="written")
        blocks = report.datablocks
        files, payload_bytes = sum(block.members for block in blocks), sum(block.payload_bytes for block in blocks)
        size_bytes = sum(block.size_bytes for block in blocks)
        yield DatasetListing(
            dataset_id, len(blocks), report.datablock_count or len(blocks), files, payload_bytes, size_bytes, ""
        )

    def holding(self, dataset_id: str) -> AbstractAsyncContextManager[None]:  # noqa: ARG002 - the engine's
        """Nothing: a dataset is the daemon's own business, and it does one thing at a time with it."""
        return nullcontext()

    async def _report(self, order: JobOrder) -> dict[str, Any]:
        job: JobView | None = None
        try:
            job = await self._order(order)
            async with aclosing(self._client.follow(job.id)) as events:
                async for event in events:
                    self._teller.tell(event)
        except anyio.get_cancelled_exc_class():
            with anyio.move_on_after(_CANCEL_S, shield=True):
                await self._cancel(order, job)
            raise
        done = await self._client.result(await self._client.job(job.id))
        dataset = done.datasets[0]
        if dataset.report is None:
            raise failure_error(dataset)
        return dataset.report

    async def _order(self, order: JobOrder) -> JobView:
        """The job of this call: one that has failed is not found again."""
        identity = sha256(msgspec.json.encode((self._run, order))).hexdigest()[:40]
        attempt = 1
        while True:
            job = await self._client.submit(order, key=f"{identity}-{attempt}")
            if not is_final(job.state) or job.state == "done" or attempt == _TRIES:
                return job
            attempt += 1

    async def _cancel(self, order: JobOrder, job: JobView | None) -> None:
        """Cancels the call's job; the daemon may have it though its answer did not come, and tells when asked again."""
        try:
            await self._client.cancel((job or await self._order(order)).id)
        except MoverError as error:
            _log.warning("%s of %s may go on in the daemon: %s", order.kind, ", ".join(order.dataset_ids), error)


class ProgressTeller:
    """Makes the engine's events of the daemon's, for displays."""

    def __init__(self, tell: Callable[[Progress], None]) -> None:
        self._tell = tell
        self._seen: set[tuple[str, int, Stage]] = set()

    def tell(self, event: JobEvent) -> None:
        """One event of a job."""
        if event.type == "progress" and event.dataset is not None:
            self._tell_progress(event.dataset)
        elif event.transition is not None and event.transition.dataset_id and event.transition.state == "waiting":
            told = event.transition
            self._tell(Progress(told.dataset_id, Stage.LOCK, "waiting", reason=told.reason))

    def _tell_progress(self, view: DatasetView) -> None:
        stage = _STAGES.get(view.stage)
        if stage is None:
            return
        key = (view.dataset_id, view.datablock, stage)
        work = (view.work_done_bytes, view.work_total_bytes)
        state: Literal["started", "progress", "waiting", "finished"] = "progress"
        if view.state == "waiting":
            state = "waiting"
        elif key not in self._seen:
            self._seen.add(key)
            self._tell(Progress(view.dataset_id, stage, "started", view.datablock, 0, view.total_bytes, "", *work))
        if state == "progress" and view.done_bytes == view.total_bytes and stage in _PAYLOAD:
            state = "finished"
        amounts = (view.done_bytes, view.total_bytes)
        self._tell(Progress(view.dataset_id, stage, state, view.datablock, *amounts, view.reason, *work))


def plan_of(report: dict[str, Any]) -> DatasetPlan:
    """The plan of a job's report, with as many members as it has, which are all the same and say nothing."""
    dataset_id = report["dataset_id"]
    datablocks = tuple(
        Datablock(dataset_id, item["number"], (_MEMBER,) * item["members"], item["payload_bytes"], item["size_bytes"])
        for item in report["datablocks"]
    )
    numbers = {name: report[name] for name in ("fingerprint", "file_count", "payload_bytes", "size_bytes")}
    anomalies = msgspec.convert(report["anomalies"], tuple[Anomaly, ...])
    return DatasetPlan(dataset_id, datablocks, anomalies=anomalies, **numbers)
