"""The four documented limits: bounded semaphores that show who holds them and may be changed while in use."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import anyio
import msgspec

from mover.errors import ConfigError

__all__ = ["Limit", "LimitStatistics", "Limits"]


class LimitStatistics(msgspec.Struct, frozen=True):
    """A limit's state: its slots, who holds one, how many wait, and the most that were held at a time.

    ``granted``: slots given so far, after ``waited_s`` seconds in sum; ``longest_wait_s``: of those that wait now;
    ``waiters``: who they are.
    """

    name: str
    slots: int
    holders: tuple[str, ...]
    waiting: int
    peak: int
    granted: int = 0
    waited_s: float = 0.0
    longest_wait_s: float = 0.0
    waiters: tuple[str, ...] = ()


class Limit:
    """A bounded semaphore, first come first served. Lowering it lets running work finish."""

    def __init__(self, name: str, slots: int) -> None:
        self.name = name
        self._limiter = anyio.CapacityLimiter(slots)
        self._holders: list[str] = []
        self._peak = 0
        self._granted = 0
        self._waited_s = 0.0
        self._arrivals: dict[object, float] = {}
        self._waiters: dict[object, str] = {}

    @asynccontextmanager
    async def slot(self, holder: str) -> AsyncIterator[None]:
        """Holds one slot inside the block; waits until one is free."""
        borrower = object()
        self._arrivals[borrower] = arrival = anyio.current_time()
        self._waiters[borrower] = holder
        try:
            await self._limiter.acquire_on_behalf_of(borrower)
        finally:
            del self._arrivals[borrower], self._waiters[borrower]
        self._granted += 1
        self._waited_s += anyio.current_time() - arrival
        self._holders.append(holder)
        self._peak = max(self._peak, len(self._holders))
        try:
            yield
        finally:
            self._holders.remove(holder)
            self._limiter.release_on_behalf_of(borrower)

    def resize(self, slots: int) -> None:
        """Changes the number of slots from now on."""
        self._limiter.total_tokens = slots

    def statistics(self) -> LimitStatistics:
        """The limit's state now."""
        longest_wait_s = anyio.current_time() - next(iter(self._arrivals.values())) if self._arrivals else 0.0
        return LimitStatistics(
            self.name,
            int(self._limiter.total_tokens),
            tuple(self._holders),
            self._limiter.statistics().tasks_waiting,
            self._peak,
            self._granted,
            self._waited_s,
            longest_wait_s,
            tuple(self._waiters.values()),
        )


class Limits:
    """The limits of one engine, by what they guard."""

    def __init__(
        self, *, lts_free: int = 1, move_to_lts: int = 2, verify_lts: int = 1, lts_to_retrieval: int = 1
    ) -> None:
        self.lts_free = Limit("LTS_FREE_LIMIT", lts_free)
        self.move_to_lts = Limit("MOVE_TO_LTS_LIMIT", move_to_lts)
        self.verify_lts = Limit("VERIFY_LTS_LIMIT", verify_lts)
        self.lts_to_retrieval = Limit("LTS_TO_RETRIEVAL_LIMIT", lts_to_retrieval)
        self.changed = anyio.Event()
        """Set by the next change; there is another one then."""

    def resize(self, slots: Mapping[str, int]) -> None:
        """Changes limits by their names, all of them or none.

        Raises:
            ConfigError: an unknown name, or a number below 1.
        """
        limits = {limit.name: limit for limit in self._all}
        for name, number in slots.items():
            if name not in limits:
                raise ConfigError(name, number, "one of " + ", ".join(limits))
            if number < 1:
                raise ConfigError(name, number, "1 or more")
        for name, number in slots.items():
            limits[name].resize(number)
        self.changed.set()
        self.changed = anyio.Event()

    def statistics(self) -> tuple[LimitStatistics, ...]:
        """All four, in the order of the documentation."""
        return tuple(limit.statistics() for limit in self._all)

    @property
    def slots_to_lts(self) -> int:
        """Of all stages on the way to the LTS together."""
        return sum(limit.statistics().slots for limit in (self.lts_free, self.move_to_lts, self.verify_lts))

    @property
    def _all(self) -> tuple[Limit, ...]:
        return self.lts_free, self.move_to_lts, self.verify_lts, self.lts_to_retrieval
