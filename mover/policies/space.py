"""The space gate: a datablock may be written when the share keeps its floor of free space, reservations counted.

It decides on readings that it is given and does no I/O itself. First come, first served: a large datablock that waits
is not overtaken, so it cannot starve behind small ones.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import msgspec

from mover.errors import NotEnoughSpaceError

__all__ = ["Reservation", "SpaceGate", "SpaceReading", "SpaceStatistics"]

_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 60.0


class SpaceReading(msgspec.Struct, frozen=True):
    """The share at one moment: its size, and what an unprivileged writer may still take."""

    total_bytes: int
    free_bytes: int


class SpaceStatistics(msgspec.Struct, frozen=True):
    """State of a gate: bytes reserved but not yet written, open reservations, datablocks that wait."""

    reserved_bytes: int
    reservations: int
    waiting: int


class Reservation:
    """Space promised to one datablock; ``remaining_bytes`` is what the share's free space still includes of it."""

    def __init__(self, size_bytes: int) -> None:
        """Begins with nothing written."""
        self.size_bytes = size_bytes
        self.remaining_bytes = size_bytes

    def shrink_to(self, remaining_bytes: int) -> None:
        """Tells that only ``remaining_bytes`` are still to be taken: the others are on the share and in its readings.

        Never grows. 0 after a preallocation. To be called on the event loop, after the bytes were taken.
        """
        self.remaining_bytes = max(0, min(self.remaining_bytes, remaining_bytes))


class SpaceGate:
    """Admits datablocks one at a time while ``free - reserved - size`` leaves ``floor_percentage`` of the share."""

    def __init__(
        self,
        reading: Callable[[], Awaitable[SpaceReading]],
        floor_percentage: float,
        *,
        deadline_s: float,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
        clock: Callable[[], float] = anyio.current_time,
    ) -> None:
        """``deadline_s`` bounds the wait of each datablock, counted from its own arrival."""
        self._reading = reading
        self.floor_percentage = floor_percentage
        self._deadline_s = deadline_s
        self._sleep = sleep
        self._clock = clock
        self._turn = anyio.Lock()
        self._open: set[Reservation] = set()
        self._waiting = 0

    @asynccontextmanager
    async def admit(
        self, size_bytes: int, on_wait: Callable[[str, float], None] | None = None
    ) -> AsyncIterator[Reservation]:
        """Waits until ``size_bytes`` fit and holds them until the block ends, however it ends.

        ``on_wait`` is told the reason and the seconds waited, before each wait.

        Raises:
            NotEnoughSpaceError: the deadline passed, or the datablock cannot fit even into the empty share.
        """
        reservation = await self._acquire(size_bytes, on_wait or _ignore)
        try:
            yield reservation
        finally:
            self._open.discard(reservation)

    def statistics(self) -> SpaceStatistics:
        """The gate's state now."""
        return SpaceStatistics(self._reserved_bytes(), len(self._open), self._waiting)

    def _reserved_bytes(self) -> int:
        return sum(reservation.remaining_bytes for reservation in self._open)

    async def _acquire(self, size_bytes: int, on_wait: Callable[[str, float], None]) -> Reservation:
        arrival = self._clock()
        self._waiting += 1
        try:
            if self._turn.locked():
                on_wait(f"{self._waiting - 1:,} other datablock(s) wait for space on the LTS first", 0.0)
            async with self._turn:
                return await self._wait_for_space(size_bytes, arrival, on_wait)
        finally:
            self._waiting -= 1

    async def _wait_for_space(
        self, size_bytes: int, arrival: float, on_wait: Callable[[str, float], None]
    ) -> Reservation:
        wait_s = _FIRST_WAIT_S
        while True:
            # Taken before the reading: what is written meanwhile counts twice for a moment, never not at all.
            reserved_bytes = self._reserved_bytes()
            reading = await self._reading()
            floor_bytes = math.ceil(reading.total_bytes * self.floor_percentage / 100)
            spare_bytes = reading.free_bytes - reserved_bytes - floor_bytes
            if size_bytes <= spare_bytes:
                reservation = Reservation(size_bytes)
                self._open.add(reservation)
                return reservation
            waited_s = self._clock() - arrival
            left_s = self._deadline_s - waited_s
            if left_s <= 0 or size_bytes > reading.total_bytes - floor_bytes:
                raise NotEnoughSpaceError(size_bytes, reading.free_bytes, reserved_bytes, floor_bytes, waited_s)
            missing_bytes = size_bytes - spare_bytes
            on_wait(f"the LTS lacks {missing_bytes:,} of {size_bytes:,} bytes", waited_s)
            await self._sleep(min(wait_s, left_s))
            wait_s = min(wait_s * 2, _LONGEST_WAIT_S)


def _ignore(_reason: str, _waited_s: float) -> None:
    """Stands in for a caller that does not want to know."""
