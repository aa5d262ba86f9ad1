"""Whether and when a failed call is tried again: full-jitter back-off in three classes, without I/O of its own."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Final, Literal, TypeVar

import anyio
import msgspec

from mover.errors import CatalogueTransientError, DaemonTransientError, MoverError, ObjectThrottledError

__all__ = ["Progressing", "RetryClass", "RetryPolicy", "delay_s", "retry_class", "retrying"]

T = TypeVar("T")

RetryClass = Literal["throttle", "transient", "permanent"]
"""``throttle``: the server asks for a slower pace; ``transient``: it passes; ``permanent``: somebody has to act."""

_MAX_DOUBLINGS: Final = 60  # beyond it every base is above every cap, and 2.0**n would overflow


class RetryPolicy(msgspec.Struct, frozen=True):
    """How often and how patiently a call is repeated.

    ``attempts`` counts all tries, the first one included. The pause after failure ``n`` is drawn from 0 to
    ``min(cap_s, base * 2**(n-1))``, where base is ``base_s``, or ``throttle_base_s`` for a throttled call. A server's
    Retry-After is waited out on top of it, at most ``retry_after_cap_s`` of it.
    """

    attempts: int = 8
    base_s: float = 0.2
    cap_s: float = 30.0
    throttle_base_s: float = 1.0
    retry_after_cap_s: float = 300.0


class Progressing:
    """Counts failures in a row of one long operation; the operation says when it got further.

    A stream of a terabyte may fail a hundred times and still arrive: only failures without progress between them
    use up the attempts.
    """

    def __init__(self) -> None:
        self._failures = 0

    @property
    def failures(self) -> int:
        """Failures since the last progress."""
        return self._failures

    def advanced(self) -> None:
        """Some bytes arrived for good: the attempts are counted afresh."""
        self._failures = 0

    def failed(self) -> int:
        """Counts a failure and returns how many there are in a row."""
        self._failures += 1
        return self._failures


def retry_class(error: BaseException) -> RetryClass:
    """The class of an error, as counted in statistics; what is no MoverError is permanent."""
    if isinstance(error, ObjectThrottledError) or _retry_after_s(error) is not None:
        return "throttle"
    return "transient" if isinstance(error, MoverError) and error.retryable else "permanent"


def delay_s(policy: RetryPolicy, attempt: int, error: BaseException, rng: Callable[[], float]) -> float | None:
    """Seconds to wait before the next try, or None when there is none.

    Args:
        policy: the numbers.
        attempt: failures in a row so far, this one included (from 1).
        error: the failure.
        rng: uniform in [0, 1).
    """
    kind = retry_class(error)
    if kind == "permanent" or attempt >= policy.attempts:
        return None
    base_s = policy.throttle_base_s if kind == "throttle" else policy.base_s
    jitter_s = rng() * min(policy.cap_s, base_s * 2.0 ** min(attempt - 1, _MAX_DOUBLINGS))
    return jitter_s + min(max(_retry_after_s(error) or 0.0, 0.0), policy.retry_after_cap_s)


def _retry_after_s(error: BaseException) -> float | None:
    """What the server asked for; None: nothing."""
    told = (ObjectThrottledError, CatalogueTransientError, DaemonTransientError)
    return error.retry_after_s if isinstance(error, told) else None


async def retrying(
    operation: Callable[[], Awaitable[T]],
    policy: RetryPolicy,
    *,
    progress: Progressing | None = None,
    sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    rng: Callable[[], float] = random.random,
    on_retry: Callable[[MoverError, int, float], None] | None = None,
    final: tuple[type[MoverError], ...] = (),
) -> T:
    """Awaits ``operation`` until it succeeds, fails for good or the attempts are used up; the last error is raised.

    Args:
        operation: one attempt.
        policy: the numbers.
        progress: given by an operation that goes on where it stopped; its ``advanced`` gives the attempts back.
        sleep: waits a number of seconds.
        rng: uniform in [0, 1).
        on_retry: told before each pause: the error, failures in a row, seconds of the pause.
        final: errors that are not repeated here though they may pass: the operation has been patient with them itself.

    Raises:
        MoverError: of the last attempt.
    """
    counter = progress or Progressing()
    while True:
        try:
            return await operation()
        except MoverError as error:
            attempt = counter.failed()
            pause_s = delay_s(policy, attempt, error, rng)
            if pause_s is None or isinstance(error, final):
                raise
            if on_retry is not None:
                on_retry(error, attempt, pause_s)
        await sleep(pause_s)
