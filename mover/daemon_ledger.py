"""Changes of jobs on their way: applied in memory, written to the journal in that order, told once they are durable."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import anyio
import anyio.lowlevel
import msgspec

from mover.api import JobOptions, is_final
from mover.daemon_book import Item, Job, Tally, Update
from mover.daemon_events import EventHub
from mover.daemon_reports import PackedReport
from mover.daemon_store import Pending, Store
from mover.daemon_store_rows import write_changes
from mover.daemon_store_schema import Changes, ItemRow, JobRow
from mover.daemon_views import end_event, progress_event, state_event
from mover.errors import JournalError
from mover.tasks import TURN

__all__ = ["Entry", "Ledger", "file_entries"]

_log = logging.getLogger(__name__)

_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 10.0
_ENDS: Final = 64
_ENTRY_CHARACTERS: Final = 1024


def file_entries(options: JobOptions) -> int:
    """How much an order's files count beside datasets, as they stay in memory: a long name as often as it is long."""
    return sum(1 + len(path) // _ENTRY_CHARACTERS for path in options.files)


class Entry(msgspec.Struct, frozen=True):
    """A change that is on its way into the journal."""

    job: Job
    changes: Changes
    pending: Pending


class Ledger:
    """The unfinished jobs, and the way in which they change. ``clock`` is the wall clock in seconds."""

    def __init__(self, store: Store, hub: EventHub, clock: Callable[[], float]) -> None:
        self.jobs: dict[str, Job] = {}
        self.tally = Tally()
        self.files = 0  # that the orders of these jobs name, as entries
        self.ended: Counter[tuple[str, str]] = Counter()  # datasets, by kind and state
        self.ends_s: deque[float] = deque(maxlen=_ENDS)  # when the last jobs ended
        self.hub, self.clock, self._store = hub, clock, store
        self._arrivals = 0

    @property
    def now_ms(self) -> int:
        """The time, milliseconds since 1970."""
        return int(self.clock() * 1000)

    async def add(self, row: JobRow, rows: Sequence[ItemRow]) -> Job:
        """Takes in a job that is durable.

        Others have their turns while a large one is put together: its arrivals are its own before that, and nobody
        can see the job before it is whole.
        """
        first = self._arrivals
        self._arrivals += len(rows)
        job = Job(row, rows[:TURN], first, self.tally, open_end=bool(row.catalogue_job))
        for start in range(TURN, len(rows), TURN):
            await anyio.lowlevel.checkpoint()
            job.take(rows[start : start + TURN], first + start)
        self.jobs[row.id] = job
        self.files += file_entries(row.options)
        return job

    def enter(
        self,
        job: Job,
        updates: Sequence[Update] = (),
        *,
        reason: str | None = None,
        end: bool = False,
        report: PackedReport | None = None,
    ) -> Entry:
        """Applies changes and puts them on their way; what is entered later is written later.

        ``reason`` is the job's; ``end``: the last thing is done for it; ``report``: of the one dataset that changes.
        """
        self.ended.update((job.row.kind, update.fields["state"]) for update in updates if _ends(update))
        changes = job.change(updates, self.now_ms, reason=reason, end=end)
        if report is not None:
            changes = msgspec.structs.replace(changes, report=report.body, report_bytes=report.size_bytes)
        job.unwritten += 1
        return Entry(job, changes, self._store.enqueue(partial(write_changes, changes=changes)))

    async def settle(self, entry: Entry) -> None:
        """Returns once the entry is durable and told; a journal that refuses is tried again until it does not."""
        pending, pause_s = entry.pending, _FIRST_PAUSE_S
        try:
            while True:
                try:
                    await pending.wait()
                    break
                except JournalError as error:
                    _log.warning("job %s waits for the journal: %s", entry.job.row.id, error)
                await anyio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                pending = self._store.enqueue(partial(write_changes, changes=entry.changes))
        finally:
            entry.job.unwritten -= 1
        self._tell(entry)

    def _tell(self, entry: Entry) -> None:
        for row in entry.changes.transitions:
            self.hub.publish(state_event(row))
        if is_final(entry.changes.state) and self.jobs.pop(entry.job.row.id, None) is not None:
            self.ends_s.append(self.clock())
            self.files -= file_entries(entry.job.row.options)
            self.hub.publish(end_event(entry.job.row))

    def tell_progress(self, item: Item) -> None:
        """Tells how a dataset in work stands, unless a change is on its way: numbers grow in the order of events."""
        if item.live is None or item.live.told or item.job.unwritten or not self.hub.wanted(item.job.row.id):
            return
        item.live.told = True
        self.hub.publish(progress_event(item, item.job.next_number(self.now_ms)))


def _ends(update: Update) -> bool:
    return is_final(update.fields.get("state", "queued"))
