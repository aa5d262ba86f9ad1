"""Which dataset is worked on next: owners share evenly, priorities count within an owner, no dataset twice at a time.

Of the owners who have something to do, the one with the least work under way is next; of equals the one whose work has
cost least so far. An owner who comes, or comes back, begins no lower than whoever was picked last: idle time is no
credit. Lanes (kinds of work) are picked from separately, and share nothing but the datasets.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

__all__ = ["FairQueue", "Rank", "Waiting"]

_LEAST_COST_S: Final = 0.001  # work that takes no time at all still counts as a turn
_SWEEP_AT: Final = 1024


class Rank(NamedTuple):
    """Order within an owner: what was begun before, then the higher priority, then what came first."""

    begun_before: bool
    priority: int
    arrival: int

    @property
    def key(self) -> tuple[bool, int, int]:
        """Sorts ascending."""
        return not self.begun_before, -self.priority, self.arrival


class Waiting(Protocol):
    """What waits for its turn. ``arrival`` of the rank is unique."""

    @property
    def lane(self) -> str:
        """The kind of work."""
        ...

    @property
    def owner(self) -> str:
        """On whose account."""
        ...

    @property
    def dataset_id(self) -> str:
        """What it works on."""
        ...

    @property
    def rank(self) -> Rank:
        """Its place among its owner's."""
        ...


W = TypeVar("W", bound=Waiting)

_Line = list[tuple[tuple[bool, int, int], int, W]]


class _Owner(Generic[W]):
    def __init__(self, cost_s: float) -> None:
        self.line: _Line[W] = []
        self.under_way = 0
        self.cost_s = cost_s
        self.entry = 0  # the one entry among those that are up which counts


class _Lane(Generic[W]):
    def __init__(self) -> None:
        self.floor_s = 0.0  # where one who comes begins: what the owner picked last had cost until then
        self.owners: dict[str, _Owner[W]] = {}
        self._up: list[tuple[int, float, str, int]] = []  # owners with a line, the next one first
        self._entries = 0
        self._swept = _SWEEP_AT

    def enter(self, name: str) -> _Owner[W]:
        """The owner, who has something to do from now on."""
        owner = self.owners.get(name)
        if owner is None:
            self._sweep()
            owner = self.owners[name] = _Owner(self.floor_s)
        elif not owner.line and not owner.under_way:
            owner.cost_s = max(owner.cost_s, self.floor_s)
        return owner

    def put_up(self, name: str) -> None:
        """Finds the owner's place again after anything about it changed."""
        owner = self.owners[name]
        self._entries += 1
        owner.entry = self._entries
        if owner.line:
            heapq.heappush(self._up, (owner.under_way, owner.cost_s, name, owner.entry))
        if len(self._up) > 2 * len(self.owners) + _SWEEP_AT:
            self._up = [entry for entry in self._up if self._counts(entry)]
            heapq.heapify(self._up)

    def next_owner(self) -> str | None:
        """Whose turn it is."""
        while self._up:
            if self._counts(self._up[0]):
                return self._up[0][2]
            heapq.heappop(self._up)
        return None

    def _counts(self, entry: tuple[int, float, str, int]) -> bool:
        owner = self.owners.get(entry[2])
        return owner is not None and owner.entry == entry[3] and bool(owner.line)

    def _sweep(self) -> None:
        """Forgets owners who would begin at the floor anyway."""
        if len(self.owners) >= self._swept:
            for name, owner in list(self.owners.items()):
                if not owner.line and not owner.under_way and owner.cost_s <= self.floor_s:
                    del self.owners[name]
            self._swept = max(_SWEEP_AT, 2 * len(self.owners))


class FairQueue(Generic[W]):
    """A queue in memory; adding, picking and ending take O(log n) each.

    ``on_park`` is told of an item whose turn it was while its dataset is in work; it comes up again after that.
    """

    def __init__(self, on_park: Callable[[W], None] = lambda _: None) -> None:
        self._on_park = on_park
        self._lanes: dict[str, _Lane[W]] = {}
        self._parked: dict[str, _Line[W]] = {}  # by dataset
        self._in_work: set[str] = set()
        self._queued: dict[int, W] = {}  # by arrival; what is no more in here is skipped
        self._under_way: Counter[str] = Counter()
        self._entries = 0

    def __len__(self) -> int:
        return len(self._queued)

    def under_way(self, lane: str) -> int:
        """How many items of the lane were picked and have not ended."""
        return self._under_way[lane]

    def add(self, item: W) -> None:
        """Queues an item; it must not be in the queue or under way."""
        self._queued[item.rank.arrival] = item
        self._put_up(item)

    def discard(self, item: W) -> None:
        """Takes an item out that was not picked; one that is not in the queue is fine."""
        if self._queued.pop(item.rank.arrival, None) is not None:
            self._unpark(item.dataset_id)

    def pick(self, lane_name: str) -> W | None:
        """The next item of the lane, which is under way from now on; None when there is none."""
        lane = self._lanes.get(lane_name)
        while lane is not None and (name := lane.next_owner()) is not None:
            owner = lane.owners[name]
            entry = heapq.heappop(owner.line)
            item = entry[2]
            gone = self._queued.get(item.rank.arrival) is not item
            if gone or item.dataset_id in self._in_work:
                if not gone:
                    heapq.heappush(self._parked.setdefault(item.dataset_id, []), entry)
                    self._on_park(item)
                lane.put_up(name)
                continue
            del self._queued[item.rank.arrival]
            self._in_work.add(item.dataset_id)
            self._under_way[lane_name] += 1
            owner.under_way += 1
            lane.floor_s = max(lane.floor_s, owner.cost_s)
            lane.put_up(name)
            return item
        return None

    def ended(self, item: W, cost_s: float) -> None:
        """An item that was picked is no longer under way, and may be added again; its owner is charged ``cost_s``."""
        lane = self._lane(item)
        owner = lane.owners[item.owner]
        owner.under_way -= 1
        owner.cost_s += max(cost_s, _LEAST_COST_S)
        self._under_way[item.lane] -= 1
        lane.put_up(item.owner)
        if not self._under_way[item.lane] and lane.next_owner() is None:
            lane.owners.clear()  # nobody is left to be fair to
        self._in_work.discard(item.dataset_id)
        self._unpark(item.dataset_id)

    def _unpark(self, dataset_id: str) -> None:
        """The first of those that wait for a dataset comes up again; the others after it."""
        if dataset_id in self._in_work:
            return
        line = self._parked.get(dataset_id, [])
        while line:
            item = heapq.heappop(line)[2]
            if self._queued.get(item.rank.arrival) is item:
                self._put_up(item)
                break
        if not line:
            self._parked.pop(dataset_id, None)

    def _put_up(self, item: W) -> None:
        lane = self._lane(item)
        self._entries += 1
        heapq.heappush(lane.enter(item.owner).line, (item.rank.key, self._entries, item))
        lane.put_up(item.owner)

    def _lane(self, item: W) -> _Lane[W]:
        return self._lanes.setdefault(item.lane, _Lane())
