"""The daemon's work: which dataset next, its run, what became of it, and when to try again. All tasks live here."""

from __future__ import annotations

import heapq
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final, get_args

import anyio
import anyio.lowlevel
import msgspec
from anyio.abc import TaskGroup

from mover.api import JobKind
from mover.daemon_book import Item, Job, Live, Update
from mover.daemon_catalogue_runs import CatalogueRunner
from mover.daemon_ledger import Entry, Ledger
from mover.daemon_runner import Result, Runner, after_error, after_result, failure_of
from mover.daemon_store_schema import ItemRow, JobRow
from mover.daemon_waits import datablock_stem, is_same_wait, limit_waits
from mover.errors import MoverError
from mover.model import Progress
from mover.policies.fairness import FairQueue
from mover.policies.limits import LimitStatistics
from mover.policies.retry import RetryPolicy
from mover.tasks import TURN, in_turns, open_task_group

__all__ = ["Work", "WorkRules"]

_log = logging.getLogger(__name__)

_TELL_EVERY_S: Final = 0.125
_SETTLES_S: Final = 1.0  # a wait that is shorter is no change of state
_CHANGES: Final = 100  # between waiting and running, of one attempt, that are kept
_LETTING_GO_S: Final = 30.0
_LONGEST_SLEEP_S: Final = 30.0  # the clock of the host may be set
_LANES: Final[tuple[str, ...]] = get_args(JobKind)


class WorkRules(msgspec.Struct, frozen=True):
    """How work is done; see ``JobServiceConfig``. ``rng`` is uniform in [0, 1), ``limits`` are the engine's."""

    datasets_at_a_time: int
    retry: RetryPolicy
    busy_patience_s: float
    rng: Callable[[], float]
    limits: Callable[[], Sequence[LimitStatistics]]


class Work:
    """Runs the datasets of the ledger's jobs."""

    def __init__(self, ledger: Ledger, rules: WorkRules, runner: Runner, catalogue: CatalogueRunner | None) -> None:
        self._ledger, self._rules, self._runner, self._catalogue = ledger, rules, runner, catalogue
        self.has_catalogue = catalogue is not None
        self.in_work: dict[str, Item] = {}  # by dataset
        self.retries: Counter[str] = Counter()
        self.stopping = False
        self._queue: FairQueue[Item] = FairQueue(self._park)
        self._due: list[tuple[int, int, Item]] = []
        self._pick_again, self._due_changed = anyio.Event(), anyio.Event()
        self._has_work, self._let_go = anyio.Event(), anyio.Event()
        self._tasks: TaskGroup | None = None

    async def run(self) -> None:
        """Works until it is cancelled."""
        async with open_task_group() as self._tasks:
            for job in list(self._ledger.jobs.values()):
                self._close_if_done(job)
            self._tasks.start_soon(self._pick_items)
            self._tasks.start_soon(self._watch_due)
            self._tasks.start_soon(self._watch_live)

    async def queue(self, job: Job) -> None:
        """Queues a job that was accepted just now, unless it is cancelled meanwhile: then it does not go on."""
        async for item in in_turns(list(job.items.values())):
            if job.row.cancelled_by:
                return
            self._enqueue(item)

    async def take_up(self, row: JobRow, rows: Sequence[ItemRow]) -> Entry | None:
        """Queues a job of an earlier process, before ``run``: only here it changes. What was in work goes on first."""
        job = await self._ledger.add(row, rows)
        updates = []
        async for item in in_turns(list(job.items.values())):
            if row.cancelled_by:
                updates.append(_cancelled(item, row.cancelled_by))
                continue
            if item.row.state != "queued" and not item.row.retry_ms:
                updates.append(Update(item, {"state": "queued", "reason": "goes on after a restart"}))
            self._enqueue(item)
        if not updates and (job.items or job.open_end):
            return None
        return self._ledger.enter(job, updates, reason=f"cancelled by {row.cancelled_by}" if row.cancelled_by else None)

    async def cancel(self, job: Job, who: str) -> None:
        """Ends all datasets of the job; those in work as soon as they let go. Durable for the others on return."""
        # From here on, before anybody else has a turn, nothing of the job is begun: it is out of the queue and marked.
        job.row = msgspec.structs.replace(job.row, cancelled_by=who)
        rest = []
        for item in list(job.items.values()):
            if item.scope is not None:
                item.scope.cancel()
            else:
                self._queue.discard(item)
                rest.append(item)
        self._pick_again.set()
        entries = []
        while len(rest) > TURN:
            entries.append(self._ledger.enter(job, _cancellations(rest[:TURN], who)))
            rest = rest[TURN:]
            await anyio.lowlevel.checkpoint()
        entries.append(self._ledger.enter(job, _cancellations(rest, who), reason=f"cancelled by {who}"))
        for entry in entries:
            await self._ledger.settle(entry)
        self._close_if_done(job)

    async def stop(self, deadline_s: float) -> None:
        """Begins nothing more; what is in work gets the time to end, and is then stopped, to go on another time."""
        self.stopping = True
        with anyio.move_on_after(deadline_s):
            await self._until_idle()
        for item in self.in_work.values():
            if item.scope is not None:
                item.scope.cancel()
        with anyio.move_on_after(_LETTING_GO_S):  # a journal that refuses holds nobody up: it goes on all the same
            await self._until_idle()

    async def _until_idle(self) -> None:
        while self.in_work:
            self._let_go = anyio.Event()
            await self._let_go.wait()

    def tell(self, event: Progress) -> None:
        """Takes the engine's progress; returns at once."""
        item = self.in_work.get(event.dataset_id)
        if item is not None and item.live is not None:
            item.live.tell(event)

    # ---------------------------------------------------------------------------------------------- which one, when
    def _enqueue(self, item: Item) -> None:
        if item.row.retry_ms > self._ledger.now_ms:
            heapq.heappush(self._due, (item.row.retry_ms, item.rank.arrival, item))
            self._due_changed.set()
        else:
            self._queue.add(item)
            self._pick_again.set()

    async def _pick_items(self) -> None:
        while True:
            await self._pick_again.wait()
            self._pick_again = anyio.Event()
            for lane in _LANES:
                while not self.stopping and self._queue.under_way(lane) < self._rules.datasets_at_a_time:
                    item = self._queue.pick(lane)
                    if item is None:
                        break
                    item.begin(self._ledger.now_ms)
                    self.in_work[item.dataset_id] = item
                    self._has_work.set()
                    self._start(self._attempt, item)

    def _park(self, item: Item) -> None:
        reason = f"job {self.in_work[item.dataset_id].job.row.id} works on the same dataset"
        if (item.row.state, item.row.reason) != ("waiting", reason):
            update = Update(item, {"state": "waiting", "reason": reason, "retry_ms": 0})
            self._start(self._ledger.settle, self._ledger.enter(item.job, [update]))

    async def _watch_due(self) -> None:
        """Queues what waits for a time."""
        while True:
            now_ms = self._ledger.now_ms
            while self._due and self._due[0][0] <= now_ms:
                item = heapq.heappop(self._due)[2]
                if item.job.items.get(item.row.position) is item and not item.job.row.cancelled_by:
                    self._queue.add(item)
                    self._pick_again.set()
            pause_s = (self._due[0][0] - now_ms) / 1000 if self._due else _LONGEST_SLEEP_S
            with anyio.move_on_after(min(pause_s, _LONGEST_SLEEP_S)):
                await self._due_changed.wait()
            self._due_changed = anyio.Event()

    # -------------------------------------------------------------------------------------------------- one attempt
    async def _attempt(self, item: Item) -> None:
        assert item.scope is not None  # noqa: S101 - set as it was picked
        began_s = anyio.current_time()
        fields: dict[str, Any] | None = None
        result = Result()
        try:
            await self._begin(item)
            with item.scope:
                try:
                    runner = self._catalogue if item.job.row.catalogue_job and self._catalogue else self._runner
                    result = await runner.run(item)
                    fields = after_result(result)
                except Exception as error:  # noqa: BLE001 - a dataset that fails takes no other one with it
                    fields = self._error_fields(item, error)
            await self._settle_attempt(item, fields or self._stopped_fields(item), result)
        finally:
            item.live = item.scope = None
            self.in_work.pop(item.dataset_id, None)
            self._let_go.set()
            self._queue.ended(item, anyio.current_time() - began_s)
            self._pick_again.set()
        if item.row.position not in item.job.items:
            self._close_if_done(item.job)
        elif who := item.job.row.cancelled_by:  # that came while the attempt's end was on its way into the journal
            await self._ledger.settle(self._ledger.enter(item.job, [_cancelled(item, who)]))
            self._close_if_done(item.job)
        elif not self.stopping:
            self._enqueue(item)

    async def _begin(self, item: Item) -> None:
        item.begun_before = True
        fields = {"state": "running", "reason": "", "attempt": item.row.attempt + 1, "retry_ms": 0}
        entry = self._ledger.enter(item.job, [Update(item, fields)])
        if item.live is not None:
            item.live.begun = True
        await self._ledger.settle(entry)

    async def _settle_attempt(self, item: Item, fields: dict[str, Any], result: Result) -> None:
        if item.live is not None:
            self._ledger.tell_progress(item)  # how far it came, also of what was done between two looks
            item.live.begun = False
        if result.outcome is not None:
            fields["outcome"] = msgspec.json.encode(result.outcome).decode()
        if item.job.row.cancelled_by and fields["state"] == "waiting":
            fields |= _cancelled(item, item.job.row.cancelled_by).fields
        await self._ledger.settle(self._ledger.enter(item.job, [Update(item, fields)], report=result.report))

    def _error_fields(self, item: Item, error: Exception) -> dict[str, Any]:
        rules = self._rules
        fields = after_error(item, error, self._ledger.now_ms, rules.retry, rules.busy_patience_s, rules.rng)
        if not isinstance(error, MoverError):
            _log.error("%s of %s failed unexpectedly", item.lane, item.dataset_id, exc_info=error)
        if fields["state"] == "waiting":
            self.retries[failure_of(error).kind] += 1
        return fields

    def _stopped_fields(self, item: Item) -> dict[str, Any]:
        """The scope was cancelled: by who wants the job ended, or as the daemon stops."""
        if item.job.row.cancelled_by:
            return _cancelled(item, item.job.row.cancelled_by).fields
        return {"state": "queued", "reason": "stopped with the daemon; goes on after its next start"}

    # -------------------------------------------------------------------------------------------------- beside them
    def _close_if_done(self, job: Job) -> None:
        if job.items or not job.open_end:
            return
        if self._catalogue is not None:
            self._start(self._catalogue.close, job)
        else:
            self._start(self._ledger.settle, self._ledger.enter(job, reason="no catalogue is configured", end=True))

    async def _watch_live(self) -> None:
        """Tells readers how work stands, a few times a second, and keeps what waits for long."""
        while True:
            await self._has_work.wait()
            waits = limit_waits(self._rules.limits())
            for item in list(self.in_work.values()):
                if item.live is not None and item.live.begun:
                    item.live.limit_wait = waits.get(datablock_stem(item.dataset_id), "")
                    self._show_wait(item, item.live)
                    self._ledger.tell_progress(item)
            if not self.in_work:
                self._has_work = anyio.Event()
            await anyio.sleep(_TELL_EVERY_S)

    def _show_wait(self, item: Item, live: Live) -> None:
        reason, now_s = live.waits_for, anyio.current_time()
        shown = item.row.reason if item.row.state == "waiting" else ""
        if is_same_wait(reason, shown):
            live.differs_since = None
        elif live.differs_since is None:
            live.differs_since = now_s
        elif now_s - live.differs_since >= _SETTLES_S and live.changes < _most_changes(reason, shown):
            live.differs_since, live.changes = None, live.changes + 1
            update = Update(item, {"state": "waiting" if reason else "running", "reason": reason})
            self._start(self._ledger.settle, self._ledger.enter(item.job, [update]))

    def _start(self, call: Callable[..., Any], *arguments: object) -> None:
        assert self._tasks is not None  # noqa: S101 - everything that comes here runs below it
        self._tasks.start_soon(call, *arguments)


def _most_changes(reason: str, shown: str) -> int:
    """Where only the reason is another one, half as many: the end of the wait is kept all the same."""
    return _CHANGES // 2 if reason and shown else _CHANGES


def _cancellations(items: Sequence[Item], who: str) -> list[Update]:
    """Without those whose attempt ended while others had their turn, and which were cancelled there."""
    return [_cancelled(item, who) for item in items if item.row.position in item.job.items]


def _cancelled(item: Item, who: str) -> Update:
    return Update(item, {"state": "cancelled", "reason": f"cancelled by {who}", "retry_ms": 0})
