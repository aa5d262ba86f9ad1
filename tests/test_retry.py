"""The retry policy: which failures are tried again, how often, and after which pause."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mover.errors import (
    CatalogueAccessError,
    CatalogueTransientError,
    DigestMismatchError,
    LtsError,
    MoverError,
    ObjectAccessError,
    ObjectChangedError,
    ObjectMissingError,
    ObjectThrottledError,
    ObjectTransientError,
    ShortReadError,
    StallError,
)
from mover.policies.retry import Progressing, RetryPolicy, delay_s, retry_class, retrying

pytestmark = pytest.mark.anyio

POLICY = RetryPolicy()
TRANSIENT = ObjectTransientError("get", "s3://b/k", "connection lost")


def throttled(retry_after_s: float | None = None) -> ObjectThrottledError:
    return ObjectThrottledError("get", "s3://b/k", "SlowDown", retry_after_s)


def highest() -> float:
    return 1.0


class Clock:
    """Remembers the pauses instead of waiting."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)


def failing(errors: list[MoverError], before: Callable[[], None] = lambda: None) -> Callable[[], Awaitable[str]]:
    async def operation() -> str:
        before()
        if errors:
            raise errors.pop(0)
        return "done"

    return operation


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (throttled(), "throttle"),
        (TRANSIENT, "transient"),
        (StallError("get", "x", 60), "transient"),
        (ShortReadError("get", "x", 10, 5), "transient"),
        (LtsError("write", "/lts", "EIO"), "transient"),
        (CatalogueTransientError("read", "a dataset", "503"), "transient"),
        (CatalogueTransientError("read", "a dataset", "429", retry_after_s=0.0), "throttle"),
        (CatalogueAccessError("read", "a dataset", "403"), "permanent"),
        (ObjectMissingError("get", "x"), "permanent"),
        (ObjectChangedError("get", "x", "ETag", "a", "b"), "permanent"),
        (ObjectAccessError("get", "x", "AccessDenied"), "permanent"),
        (DigestMismatchError("x", "md5", "a", "b", "source"), "permanent"),
        (ValueError("a defect"), "permanent"),
    ],
)
def test_the_error_tree_decides_the_class(error: BaseException, expected: str) -> None:
    assert retry_class(error) == expected


def test_the_upper_bound_of_the_pause_doubles_up_to_the_cap() -> None:
    policy = RetryPolicy(attempts=100)
    bounds = [delay_s(policy, attempt, TRANSIENT, highest) for attempt in range(1, 12)]
    assert bounds == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0, 30.0]


def test_the_pause_is_drawn_from_zero_on() -> None:
    assert delay_s(POLICY, 5, TRANSIENT, lambda: 0.0) == 0.0
    assert delay_s(POLICY, 1, TRANSIENT, lambda: 0.5) == pytest.approx(0.1)


def test_a_throttled_call_backs_off_from_its_own_base() -> None:
    assert delay_s(POLICY, 1, throttled(), highest) == 1.0
    assert delay_s(POLICY, 3, throttled(), highest) == 4.0


def test_retry_after_is_waited_out_and_jittered_on_top() -> None:
    assert delay_s(POLICY, 1, throttled(7.0), lambda: 0.0) == 7.0
    assert delay_s(POLICY, 1, throttled(7.0), lambda: 0.5) == 7.5


def test_an_absurd_retry_after_is_bounded() -> None:
    assert delay_s(POLICY, 1, throttled(86_400.0), lambda: 0.0) == POLICY.retry_after_cap_s
    assert delay_s(POLICY, 1, throttled(-5.0), lambda: 0.0) == 0.0


@given(
    attempt=st.integers(min_value=1, max_value=100_000),
    draw=st.floats(min_value=0, max_value=1, exclude_max=True),
    retry_after_s=st.none() | st.floats(min_value=-10, max_value=1e6),
)
def test_every_pause_is_finite_and_bounded(attempt: int, draw: float, retry_after_s: float | None) -> None:
    policy = RetryPolicy(attempts=10**6)
    for error in (TRANSIENT, throttled(retry_after_s)):
        pause_s = delay_s(policy, attempt, error, lambda: draw)
        assert pause_s is not None
        assert 0 <= pause_s <= policy.cap_s + policy.retry_after_cap_s


def test_the_last_attempt_is_followed_by_none() -> None:
    assert delay_s(POLICY, POLICY.attempts - 1, TRANSIENT, highest) is not None
    assert delay_s(POLICY, POLICY.attempts, TRANSIENT, highest) is None


async def test_a_transient_failure_is_repeated_until_it_passes() -> None:
    clock = Clock()
    seen: list[tuple[MoverError, int, float]] = []
    result = await retrying(
        failing([TRANSIENT, TRANSIENT]),
        POLICY,
        sleep=clock.sleep,
        rng=highest,
        on_retry=lambda error, attempt, pause_s: seen.append((error, attempt, pause_s)),
    )
    assert result == "done"
    assert clock.pauses == [0.2, 0.4]
    assert seen == [(TRANSIENT, 1, 0.2), (TRANSIENT, 2, 0.4)]


async def test_a_permanent_failure_is_raised_at_once() -> None:
    clock = Clock()
    with pytest.raises(ObjectMissingError):
        await retrying(failing([ObjectMissingError("get", "x")]), POLICY, sleep=clock.sleep)
    assert clock.pauses == []


async def test_attempts_count_the_first_try_and_the_last_error_is_raised() -> None:
    clock = Clock()
    calls: list[int] = []
    errors: list[MoverError] = [ObjectTransientError("get", "x", f"failure {n}") for n in range(1, 10)]
    with pytest.raises(ObjectTransientError, match="failure 3"):
        await retrying(
            failing(errors, lambda: calls.append(1)),
            RetryPolicy(attempts=3),
            sleep=clock.sleep,
        )
    assert len(calls) == 3
    assert len(clock.pauses) == 2


async def test_what_is_no_mover_error_passes_through() -> None:
    async def defect() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        await retrying(defect, POLICY, sleep=Clock().sleep)


async def test_progress_gives_the_attempts_back() -> None:
    clock, progress = Clock(), Progressing()
    operation = failing([TRANSIENT] * 50, progress.advanced)
    assert (
        await retrying(operation, RetryPolicy(attempts=2), progress=progress, sleep=clock.sleep, rng=highest) == "done"
    )
    assert clock.pauses == [0.2] * 50


async def test_an_error_that_is_final_here_is_raised_at_once_though_it_may_pass() -> None:
    errors: list[MoverError] = [TRANSIENT] * 3
    clock = Clock()
    with pytest.raises(ObjectTransientError):
        await retrying(failing(errors), POLICY, sleep=clock.sleep, final=(ObjectTransientError,))
    assert (len(errors), clock.pauses) == (2, [])


async def test_without_progress_the_attempts_run_out() -> None:
    progress = Progressing()
    errors: list[MoverError] = [TRANSIENT] * 50
    with pytest.raises(ObjectTransientError):
        await retrying(failing(errors), RetryPolicy(attempts=4), progress=progress, sleep=Clock().sleep)
    assert progress.failures == 4
    assert len(errors) == 46
