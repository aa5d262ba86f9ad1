from __future__ import annotations

import time
from collections import Counter

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mover.policies.fairness import FairQueue, Rank


class Item(msgspec.Struct, frozen=True):
    lane: str
    owner: str
    dataset_id: str
    rank: Rank


def item(owner: str, arrival: int, *, dataset: str = "", priority: int = 0, lane: str = "archive") -> Item:
    return Item(lane, owner, dataset or f"d{arrival}", Rank(False, priority, arrival))


class QueueMachine(RuleBasedStateMachine):
    """Against a model that looks at everything each time."""

    def __init__(self) -> None:
        super().__init__()
        self.parked: list[Item] = []
        self.queue: FairQueue[Item] = FairQueue(self.parked.append)
        self.queued: dict[int, Item] = {}
        self.in_work: list[Item] = []
        self.arrivals = 0

    @rule(
        lane=st.sampled_from(["archive", "plan"]),
        owner=st.sampled_from("abc"),
        dataset=st.sampled_from("uvwxyz"),
        priority=st.integers(-1, 1),
        begun=st.booleans(),
    )
    def add(self, lane: str, owner: str, dataset: str, priority: int, begun: bool) -> None:
        self.arrivals += 1
        new = Item(lane, owner, dataset, Rank(begun, priority, self.arrivals))
        self.queue.add(new)
        self.queued[self.arrivals] = new

    @rule(lane=st.sampled_from(["archive", "plan"]))
    def pick(self, lane: str) -> None:
        busy = {other.dataset_id for other in self.in_work}
        free = [one for one in self.queued.values() if one.lane == lane and one.dataset_id not in busy]
        loads = Counter(other.owner for other in self.in_work if other.lane == lane)
        picked = self.queue.pick(lane)
        if picked is None:
            # of several that waited for one dataset only the first has come up again: it is in another owner's line
            assert not free or all(any(q.dataset_id == f.dataset_id for q in self._others(f)) for f in free)
            return
        assert picked in free
        del self.queued[picked.rank.arrival]
        rivals = [one for one in free if one.owner == picked.owner and not self._others(one)]
        assert all(picked.rank.key <= rival.rank.key for rival in rivals)
        owners = {one.owner for one in free if not self._others(one)}
        assert all(loads[picked.owner] <= loads[owner] for owner in owners)
        self.in_work.append(picked)

    def _others(self, one: Item) -> list[Item]:
        """What is queued for the same dataset besides, and was parked or made others park."""
        return [
            q for q in self.queued.values() if q.dataset_id == one.dataset_id and q is not one and q in self.parked
        ] + ([one] if one in self.parked else [])

    @precondition(lambda self: self.in_work)
    @rule(data=st.data(), cost_s=st.floats(0, 100), again=st.booleans())
    def end(self, data: st.DataObject, cost_s: float, again: bool) -> None:
        ended = data.draw(st.sampled_from(self.in_work))
        self.in_work.remove(ended)
        self.queue.ended(ended, cost_s)
        if again:
            self.queue.add(ended)
            self.queued[ended.rank.arrival] = ended

    @precondition(lambda self: self.queued)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(list(self.queued.values())))
        self.queue.discard(gone)
        del self.queued[gone.rank.arrival]

    @invariant()
    def no_dataset_is_in_work_twice(self) -> None:
        datasets = [one.dataset_id for one in self.in_work]
        assert len(datasets) == len(set(datasets))

    @invariant()
    def nothing_is_lost(self) -> None:
        assert len(self.queue) == len(self.queued)

    def teardown(self) -> None:
        """Whatever happened before, all that is queued comes up."""
        while self.in_work or self.queued:
            while self.in_work:
                self.queue.ended(self.in_work.pop(), 1.0)
            before = len(self.queued)
            for lane in ("archive", "plan"):
                while (picked := self.queue.pick(lane)) is not None:
                    del self.queued[picked.rank.arrival]
                    self.in_work.append(picked)
            assert len(self.queued) < before or not before


QueueMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestQueueMachine = QueueMachine.TestCase


def drained(queue: FairQueue[Item], cost_s: dict[str, float]) -> list[Item]:
    order = []
    while (picked := queue.pick("archive")) is not None:
        order.append(picked)
        queue.ended(picked, cost_s[picked.owner])
    return order


def test_a_job_of_many_datasets_does_not_keep_another_owner_waiting() -> None:
    queue: FairQueue[Item] = FairQueue()
    for arrival in range(1_000):
        queue.add(item("many", arrival))
    queue.add(item("one", 1_000))
    assert [one.owner for one in drained(queue, {"many": 1.0, "one": 1.0})[:2]].count("one") == 1


def test_slots_are_shared_evenly_and_what_is_left_is_used() -> None:
    queue: FairQueue[Item] = FairQueue()
    for arrival in range(90):
        queue.add(item("abc"[arrival % 3], arrival))
    picked = [queue.pick("archive") for _ in range(6)]
    assert Counter(one.owner for one in picked if one) == {"a": 2, "b": 2, "c": 2}


def test_with_one_slot_owners_share_time_not_turns() -> None:
    queue: FairQueue[Item] = FairQueue()
    for arrival in range(200):
        queue.add(item("short" if arrival % 2 else "long", arrival))
    order = [one.owner for one in drained(queue, {"long": 10.0, "short": 1.0})[:55]]
    assert order.count("short") == 50


def test_idle_time_is_no_credit() -> None:
    queue: FairQueue[Item] = FairQueue()
    for arrival in range(100):
        queue.add(item("busy", arrival))
    for _ in range(50):
        picked = queue.pick("archive")
        assert picked is not None
        queue.ended(picked, 10.0)
    for arrival in range(100, 150):
        queue.add(item("new", arrival))
    order = [one.owner for one in drained(queue, {"busy": 10.0, "new": 10.0})[:20]]
    assert 9 <= order.count("new") <= 11


def test_coming_back_for_every_single_dataset_gains_nothing() -> None:
    queue: FairQueue[Item] = FairQueue()
    for arrival in range(100):
        queue.add(item("steady", arrival))
    spent, arrival = Counter[str](), 100
    queue.add(item("again", arrival))
    for _ in range(60):
        picked = queue.pick("archive")
        assert picked is not None
        queue.ended(picked, 5.0 if picked.owner == "again" else 1.0)
        spent[picked.owner] += 5 if picked.owner == "again" else 1
        if picked.owner == "again":
            arrival += 1
            queue.add(item("again", arrival))
    assert spent["steady"] >= 0.8 * spent["again"]


def test_priorities_order_one_owners_work_and_nobody_elses() -> None:
    queue: FairQueue[Item] = FairQueue()
    for arrival in range(4):
        queue.add(item("loud", arrival, priority=100))
    for arrival in range(4, 8):
        queue.add(item("quiet", arrival, priority=arrival))
    order = drained(queue, {"loud": 1.0, "quiet": 1.0})
    assert [one.rank.arrival for one in order if one.owner == "quiet"] == [7, 6, 5, 4]
    assert Counter(one.owner for one in order[:4]) == {"loud": 2, "quiet": 2}


@pytest.mark.slow
def test_100_000_datasets_of_20_000_owners_are_queued_and_picked_in_seconds() -> None:
    queue: FairQueue[Item] = FairQueue()
    began = time.perf_counter()
    for arrival in range(100_000):
        queue.add(item(f"o{arrival % 20_000}", arrival, dataset=f"d{arrival % 70_000}"))
    picked = 0
    running: list[Item] = []
    while picked < 100_000:
        while len(running) < 8 and (one := queue.pick("archive")) is not None:
            running.append(one)
            picked += 1
        queue.ended(running.pop(0), 1.0)
    assert len(queue) == 0
    assert time.perf_counter() - began < 20


def test_owners_who_are_gone_are_forgotten() -> None:
    queue: FairQueue[Item] = FairQueue()
    for arrival in range(20_000):
        queue.add(item("steady" if arrival % 2 else f"o{arrival}", arrival))
        if arrival > 10:
            picked = queue.pick("archive")
            assert picked is not None
            queue.ended(picked, 1.0)
    assert len(queue._lanes["archive"].owners) < 5_000  # noqa: SLF001 - memory is seen from nowhere else
