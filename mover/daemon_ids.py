"""Ids of jobs: UUIDs of version 7, which sort by the time at which they were given."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable

__all__ = ["JobIds"]

_RANDOM_BITS = 74


class JobIds:
    """Gives ids, each greater than the one before and than ``newest``, also when the clock is set back."""

    def __init__(self, newest: str, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last_ms = uuid.UUID(newest).int >> 80 if newest else 0
        self._fresh = False  # the last millisecond may have been used up before
        self._low = 0

    def next(self) -> str:
        """A new id."""
        now_ms = int(self._clock() * 1000)
        if now_ms > self._last_ms or not self._fresh:
            self._last_ms, self._fresh = max(now_ms, self._last_ms + 1), True
            self._low = random.SystemRandom().getrandbits(_RANDOM_BITS - 1)  # the highest bit is room to count
        else:
            self._low += 1 + random.getrandbits(16)
        high, low = self._low >> 62, self._low & ((1 << 62) - 1)
        return str(uuid.UUID(int=self._last_ms << 80 | 7 << 76 | high << 64 | 2 << 62 | low))
