"""What is decided about a job whose runs may be gone, for every way in which they can stand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import get_args

import pytest

from mover.policies.reconciliation import ATTEMPTS, End, Leave, RunFate, Start, next_step

FATES: tuple[RunFate, ...] = get_args(RunFate)


@pytest.mark.parametrize(
    ("fates", "attempt"),
    [
        ([], 1),
        (["crashed"], 2),
        (["failed"], 2),
        (["crashed", "failed"], 3),
        (["failed", "failed"], 3),
        (["completed"], 2),  # and the catalogue does not show it: whatever it did, it did not end the job
        (["cancelled", "crashed"], 2),  # ordered again after a cancellation, and killed
    ],
)
def test_a_job_gets_its_next_attempt(fates: Sequence[RunFate], attempt: int) -> None:
    step = next_step(finished=False, fates=fates)
    assert isinstance(step, Start)
    assert step.attempt == attempt


@pytest.mark.parametrize(("last", "words"), [("crashed", "the last run was killed"), ("failed", "the last run failed")])
def test_after_the_last_attempt_the_job_ends_as_the_systems_failure(last: RunFate, words: str) -> None:
    before: list[RunFate] = ["crashed"] * (ATTEMPTS - 1)
    step = next_step(finished=False, fates=[*before, last])
    assert isinstance(step, End)
    assert step.state == "system-error"
    assert f"failed {ATTEMPTS} times, {words}" in step.message


def test_a_cancelled_run_ends_the_job_whatever_came_before_it() -> None:
    for before in product(FATES[1:], repeat=2):
        step = next_step(finished=False, fates=[*before, "cancelled"])
        assert isinstance(step, End)
        assert step.state == "cancelled"


def test_a_run_that_nobody_repeats_ends_the_job_with_its_first_failure() -> None:
    step = next_step(finished=False, fates=["crashed"], attempts=1)
    assert isinstance(step, End)
    assert step.state == "system-error"


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_a_job_that_has_ended_or_is_worked_on_is_left_alone(length: int) -> None:
    for fates in product(FATES, repeat=length):
        assert isinstance(next_step(finished=True, fates=fates), Leave)
        assert isinstance(next_step(finished=False, fates=[*fates, "live"]), Leave)
        assert isinstance(next_step(finished=False, fates=["live", *fates]), Leave)


def test_no_history_gives_a_job_more_runs_than_it_may_have() -> None:
    for length in range(ATTEMPTS + 2):
        for fates in product(FATES, repeat=length):
            step = next_step(finished=False, fates=fates)
            tries = sum(fate != "cancelled" for fate in fates)
            assert not isinstance(step, Start) or step.attempt == tries + 1 <= ATTEMPTS
