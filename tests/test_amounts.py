"""How much of a dataset's work is done."""

from __future__ import annotations

from mover.amounts import WorkAmounts
from mover.model import Progress, Stage


def test_an_archive_moves_and_reads_back_what_its_plan_says() -> None:
    amounts = WorkAmounts()
    assert amounts.of("a") == (0, 0)
    amounts.tell(Progress("a", Stage.PLAN, "finished", total_bytes=100))
    assert amounts.of("a") == (0, 200)
    for stage, state, done_bytes in (
        (Stage.MOVE, "started", 0),
        (Stage.MOVE, "progress", 40),
        (Stage.MOVE, "waiting", 0),
        (Stage.MOVE, "finished", 60),
        (Stage.VERIFY, "started", 0),
        (Stage.VERIFY, "progress", 30),
    ):
        amounts.tell(Progress("a", stage, state, 1, done_bytes, 60))  # type: ignore[arg-type]
    assert amounts.of("a") == (90, 200)
    amounts.tell(Progress("a", Stage.MOVE, "started", 1, 0, 60))  # again, after a failure
    assert amounts.of("a") == (30, 200)


def test_work_without_a_plan_grows_as_its_datablocks_begin() -> None:
    amounts = WorkAmounts()
    amounts.tell(Progress("a", Stage.RETRIEVE, "started", 1, 0, 10))
    amounts.tell(Progress("a", Stage.RETRIEVE, "finished", 1, 10, 10))
    amounts.tell(Progress("a", Stage.RETRIEVE, "started", 2, 0, 30))
    amounts.tell(Progress("a", Stage.REGISTER, "started", 2, 0, 7))
    amounts.tell(Progress("b", Stage.VERIFY, "progress", 1, 5, 60))
    assert amounts.of("a") == (10, 40)
    assert amounts.total() == (15, 100)


def test_what_a_daemon_tells_of_the_whole_dataset_counts_and_not_the_events_that_it_leaves_out() -> None:
    amounts = WorkAmounts()
    amounts.tell(Progress("a", Stage.MOVE, "started", 7, 0, 10))
    amounts.tell(Progress("a", Stage.MOVE, "progress", 7, 3, 10, work_done_bytes=63, work_total_bytes=200))
    amounts.tell(Progress("a", Stage.REGISTER, "started", 9, 0, 0, work_done_bytes=200, work_total_bytes=200))
    assert amounts.of("a") == amounts.total() == (200, 200)
