"""Jobs of the catalogue under way in the daemon: it is told as they begin, of each dataset, and as they end."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final

import anyio
import msgspec

from mover.api import is_final
from mover.catalogue import JobCatalogue, JobDataset
from mover.daemon_book import Item, Job
from mover.daemon_ledger import Ledger
from mover.daemon_reports import PackedReport, Report
from mover.daemon_runner import Result, is_tried_again
from mover.daemon_store import Store
from mover.daemon_store_rows import read_ended
from mover.daemon_store_schema import ItemRow, JobRow
from mover.engine import Engine
from mover.errors import JobMismatchError, JournalError, MoverError
from mover.jobs import DatasetResult, JobRunner, tell
from mover.jobs_lifecycle import DatasetOutcome, JobKind, is_finished
from mover.jobs_result import job_result
from mover.jobs_settle import settle_job, this_engine
from mover.policies.retry import RetryPolicy
from mover.reports import ArchiveReport, RetrieveReport

__all__ = ["CatalogueRunner"]

_log = logging.getLogger(__name__)

_JOURNAL_PAUSE_S: Final = 0.1
_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 300.0
_REPORTS_BYTES: Final = 64 << 20
_KINDS: Final = "only archivals and retrievals are jobs of the catalogue"


class CatalogueRunner:
    """Runs jobs of the catalogue; ``on_wait`` is told (dataset, reason) while a run elsewhere holds a dataset.

    ``retry``: a failure that is tried again is raised, and the catalogue goes on showing work.
    """

    def __init__(
        self,
        engine: Engine,
        catalogue: JobCatalogue,
        pack: Callable[[Report], Awaitable[PackedReport]],
        on_wait: Callable[[str, str], None],
        store: Store,
        ledger: Ledger,
        retry: RetryPolicy,
    ) -> None:
        self._engine, self._catalogue, self._pack = engine, catalogue, pack
        self._store, self._ledger, self._retry = store, ledger, retry
        self._jobs = JobRunner(engine, catalogue, on_wait=on_wait)
        self._begun: dict[str, dict[str, JobDataset]] = {}
        self._beginning = anyio.Lock()
        self._closing: set[str] = set()

    async def run(self, item: Item) -> Result:
        """See Runner."""
        datasets = await self._begin(item.job)
        passes = partial(is_tried_again, item, policy=self._retry)
        result: DatasetResult[ArchiveReport] | DatasetResult[RetrieveReport]
        if item.job.row.kind == "archive":
            release_source = item.job.row.options.release_source
            result = await self._jobs.archive(item.dataset_id, release_source=release_source, passes=passes)
        else:
            result = await self._jobs.retrieve(datasets[item.dataset_id], passes=passes)
        if result.outcome.state == "done" and result.report is not None:
            return Result(await self._pack(result.report), result.outcome)
        return Result(None, result.outcome, result.error)

    async def close(self, job: Job) -> None:
        """Ends a job whose datasets have all ended; a catalogue that is away is told once it is back."""
        if job.row.id in self._closing:
            return
        self._closing.add(job.row.id)
        pause_s, reason = _FIRST_PAUSE_S, ""
        while not reason:
            try:
                items, reports = await self._store.read(
                    partial(read_ended, job_id=job.row.id, at_most_bytes=_REPORTS_BYTES)
                )
                if not all(is_final(item.state) for item in items):  # the end of one is still on its way there
                    await anyio.sleep(_JOURNAL_PAUSE_S)
                    continue
                code = await self._finish(job.row, items, reports)
                reason = f"the catalogue shows {code}" if code else "the catalogue was not told"
            except MoverError as error:
                if not error.retryable and not isinstance(error, JournalError):
                    reason = f"the catalogue could not be told: {error}"
                    continue
                await self._ledger.settle(self._ledger.enter(job, reason=f"waits for the catalogue: {error}"))
                await anyio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            except Exception as error:  # noqa: BLE001 - a job it does not understand ends no daemon, start after start
                _log.exception("job %s: the catalogue's job %s is not ended", job.row.id, job.row.catalogue_job)
                reason = f"the catalogue could not be told: {type(error).__name__}, a defect; the log has more"
        if job.row.cancelled_by:
            reason = f"cancelled by {job.row.cancelled_by}; {reason}"
        self._closing.discard(job.row.id)
        await self._ledger.settle(self._ledger.enter(job, reason=reason, end=True))

    async def _finish(self, row: JobRow, items: Sequence[ItemRow], reports: Sequence[bytes]) -> str:
        """Ends the job in the catalogue; returns its status code there, '' when it was never begun there.

        Raises:
            MoverError: the catalogue is away or refuses.
        """
        self._begun.pop(row.id, None)
        kind = _kind(row)
        if not any(item.outcome for item in items) and all(item.state == "failed" for item in items):
            return ""  # it is no job that could be run
        if any(item.state == "cancelled" for item in items):
            job = await self._catalogue.job(row.catalogue_job)
            if is_finished(job.status_code):
                return job.status_code
            return await settle_job(
                this_engine(self._engine), self._catalogue, job, kind, "cancelled", f"cancelled by {row.cancelled_by}"
            )
        outcomes = [await self._outcome(kind, item) for item in items]
        decoder = msgspec.json.Decoder(RetrieveReport)
        links = [decoder.decode(body) for body in reports] if kind == "retrieve" else []
        return await self._jobs.finish(row.catalogue_job, kind, outcomes, job_result(outcomes, links))

    async def _outcome(self, kind: JobKind, item: ItemRow) -> DatasetOutcome:
        """What the catalogue was told of a dataset; it is told now where it could not be then."""
        if item.outcome:
            return msgspec.json.decode(item.outcome, type=DatasetOutcome)
        message = item.failure.message if item.failure is not None else item.reason
        return await tell(self._catalogue, kind, DatasetOutcome(item.dataset_id, "system-error", message))

    async def _begin(self, job: Job) -> dict[str, JobDataset]:
        """The job's datasets as the catalogue has them; it shows that somebody works on it from now on."""
        row = job.row
        async with self._beginning:
            if row.id not in self._begun:
                found = await self._jobs.read(row.catalogue_job, _kind(row))
                datasets = {dataset.dataset_id: dataset for dataset in found}
                unknown = [item.dataset_id for item in job.items.values() if item.dataset_id not in datasets]
                if unknown or sum(job.states.values()) != len(datasets):
                    raise JobMismatchError(row.catalogue_job, "other datasets were ordered")
                await self._jobs.begin(row.catalogue_job, f"{len(datasets)} dataset(s) to {row.kind}")
                self._begun[row.id] = datasets
        return self._begun[row.id]


def _kind(row: JobRow) -> JobKind:
    if row.kind == "archive" or row.kind == "retrieve":  # noqa: PLR1714 - narrows the type
        return row.kind
    raise JobMismatchError(row.catalogue_job, _KINDS)
