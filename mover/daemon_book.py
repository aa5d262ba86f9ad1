"""The unfinished jobs of the daemon in memory: how each dataset stands, and what to write when that changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

import msgspec
from anyio import CancelScope

from mover.amounts import WorkAmounts
from mover.api import JobKind, JobState, is_final
from mover.daemon_store_schema import Changes, ItemRow, JobRow, TransitionRow
from mover.model import Progress, Stage
from mover.policies.fairness import Rank

__all__ = ["Item", "Job", "Live", "Tally", "Update"]

# What the next attempt need not do again. A read-back stays done as part of an archive; a job that verifies repeats it.
_LASTING_STAGES: Final[dict[JobKind, frozenset[Stage]]] = {
    "archive": frozenset({Stage.STAGE, Stage.MOVE, Stage.VERIFY}),
    "retrieve": frozenset({Stage.RETRIEVE}),
    "verify": frozenset(),
    "plan": frozenset(),
}
_SHOWN_WAITS: Final = 3
_UNDER_WAY: Final[tuple[JobState, ...]] = ("running", "waiting", "queued")
_ENDED_BADLY: Final[tuple[JobState, ...]] = ("failed", "cancelled")


class Live:
    """How a dataset in work stands, as the engine told last; nothing of it is kept.

    ``finished``: stages of datablocks that stay done, of all attempts; what is in it is no progress a second time.
    """

    def __init__(self, began_ms: int, kind: JobKind, finished: set[tuple[Stage, int]]) -> None:
        self.began_ms = began_ms
        self._lasting, self._finished = _LASTING_STAGES[kind], finished
        self.stage, self.datablock, self.done_bytes, self.total_bytes = "", 0, 0, 0
        self.amounts = WorkAmounts()
        self.told = True  # no progress since readers were told
        self.begun = False  # it is shown as running
        self.changes = 0  # how often it was shown to wait, and to go on
        self.advanced = False  # something that stays done was finished in this attempt: failures are counted afresh
        self.differs_since: float | None = None  # since when it waits and is not shown so, or the other way round
        self.limit_wait = ""  # the slot that its next datablock waits for
        self._waits: dict[int, str] = {}
        self._active: set[int] = set()

    def tell(self, event: Progress) -> None:
        """Takes a progress event of the engine's; returns at once."""
        self.stage, self.datablock = str(event.stage), event.datablock
        self.done_bytes, self.total_bytes = event.done_bytes, event.total_bytes
        self.amounts.tell(event)
        self.told = False
        self._waits.pop(event.datablock, None)
        self._active.discard(event.datablock)
        if event.state == "waiting":
            self._waits[event.datablock] = event.reason
        elif event.state in {"started", "progress"}:
            self._active.add(event.datablock)
        elif event.state == "finished" and event.stage in self._lasting:
            self._finish(event.stage, event.datablock)

    def _finish(self, stage: Stage, datablock: int) -> None:
        if (stage, datablock) not in self._finished:
            self._finished.add((stage, datablock))
            self.advanced = True

    @property
    def waits_for(self) -> str:
        """What all of it waits for; '' while some of it goes on."""
        reasons = list(dict.fromkeys([*self._waits.values(), *([self.limit_wait] if self.limit_wait else [])]))
        if self._active:
            return ""
        more = f" and {len(reasons) - _SHOWN_WAITS} more" if len(reasons) > _SHOWN_WAITS else ""
        return "; ".join(reasons[:_SHOWN_WAITS]) + more


class Item:
    """An unfinished dataset of a job. ``arrival`` is unique among all."""

    __slots__ = ("_arrival", "begun_before", "busy_since_ms", "finished", "job", "live", "row", "scope")

    def __init__(self, job: Job, row: ItemRow, arrival: int) -> None:
        self.job, self.row, self._arrival = job, row, arrival
        self.begun_before = row.attempt > 0
        self.busy_since_ms = 0  # when a run elsewhere was first found to hold the dataset; 0: it was not
        self.finished: set[tuple[Stage, int]] = set()  # stages of datablocks that stay done
        self.live: Live | None = None
        self.scope: CancelScope | None = None

    def begin(self, now_ms: int) -> None:
        """It is in work from now on."""
        self.live, self.scope = Live(now_ms, self.job.row.kind, self.finished), CancelScope()

    @property
    def lane(self) -> str:
        """The kind of work."""
        return self.job.row.kind

    @property
    def owner(self) -> str:
        """On whose account."""
        return self.job.row.owner

    @property
    def dataset_id(self) -> str:
        """What it works on."""
        return self.row.dataset_id

    @property
    def rank(self) -> Rank:
        """Its place among its owner's."""
        return Rank(self.begun_before, self.job.row.priority, self._arrival)


class Tally:
    """Unfinished datasets by owner and state."""

    def __init__(self) -> None:
        self.owners: dict[str, Counter[JobState]] = {}
        self.datasets = 0

    def move(self, owner: str, before: JobState | None, now: JobState) -> None:
        """A dataset of the owner is now in another state; None: it was in none."""
        counts = self.owners.setdefault(owner, Counter())
        for state, step in ((before, -1), (now, 1)):
            if state is not None and not is_final(state):
                counts[state] += step
                self.datasets += step
        if not any(counts.values()):
            del self.owners[owner]


class Update(msgspec.Struct, frozen=True):
    """What changes about one dataset: fields of its row."""

    item: Item
    fields: dict[str, Any]


class Job:
    """An unfinished job. ``items``: its unfinished datasets by position; ``states``: how many of all are in each.

    ``open_end``: it has something to do after its last dataset, so its end comes by itself. ``begun``: work on one of
    its datasets was, ever.
    """

    def __init__(
        self, row: JobRow, rows: Iterable[ItemRow], first_arrival: int, tally: Tally, *, open_end: bool
    ) -> None:
        self.row = row
        self.open_end = open_end
        self._tally = tally
        self.states: Counter[JobState] = Counter()
        self.items: dict[int, Item] = {}
        self.begun = False
        self.unwritten = 0  # changes that are on their way to the journal
        self.take(rows, first_arrival)

    def take(self, rows: Iterable[ItemRow], first_arrival: int) -> None:
        """Datasets of the job, before it is known to anybody."""
        for arrival, item in enumerate(rows, first_arrival):
            self.states[item.state] += 1
            self.begun = self.begun or item.attempt > 0
            if not is_final(item.state):
                self._tally.move(self.row.owner, None, item.state)
                self.items[item.position] = Item(self, item, arrival)

    def next_number(self, now_ms: int) -> int:
        """The number of the job's next event: they grow over restarts, too, without every one being kept."""
        number = max(self.row.last_number + 1, now_ms)
        self.row = msgspec.structs.replace(self.row, last_number=number)
        return number

    def change(
        self, updates: Iterable[Update], now_ms: int, *, reason: str | None = None, end: bool = False
    ) -> Changes:
        """Applies updates and says what is to be written; ``reason`` is the job's. ``end``: the last thing is done."""
        items, transitions = [], []
        if end:
            self.open_end = False
        for update in updates:
            row, before = self._update(update)
            items.append(row)
            if (row.state, row.reason) != (before.state, before.reason):
                transitions.append(self._transition(now_ms, row.state, row.dataset_id, row.reason))
        state, why = self.state, self.row.reason if reason is None else reason
        if (state, why) != (self.row.state, self.row.reason):
            transitions.append(self._transition(now_ms, state, "", why))
        self.row = msgspec.structs.replace(self.row, state=state, reason=why, changed_ms=now_ms)
        return Changes(self.row.id, state, why, now_ms, self.row.last_number, tuple(items), tuple(transitions))

    def _transition(self, now_ms: int, state: JobState, dataset_id: str, reason: str) -> TransitionRow:
        return TransitionRow(self.row.id, self.next_number(now_ms), now_ms, state, dataset_id, reason, self.state)

    def _update(self, update: Update) -> tuple[ItemRow, ItemRow]:
        """The dataset's new row and the one before."""
        item, before = update.item, update.item.row
        item.row = row = msgspec.structs.replace(before, **update.fields, number=self.row.last_number)
        self.begun = self.begun or row.attempt > 0
        self._tally.move(self.row.owner, before.state, row.state)
        self.states[before.state] -= 1
        self.states[row.state] += 1
        if is_final(row.state):
            self.items.pop(row.position, None)
        return row, before

    @property
    def state(self) -> JobState:
        """What follows from the datasets' states."""
        for state in _UNDER_WAY:
            if self.states[state]:
                return state
        if self.open_end:
            return "running"
        for state in _ENDED_BADLY:
            if self.states[state]:
                return state
        return "done"
