"""From progress events to bytes and rates: how much was moved since the last event, and how fast it goes now."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final

from mover.model import Progress, Stage

__all__ = ["DIRECTIONS", "ByteMeter", "Rate"]

DIRECTIONS: Final = {
    Stage.STAGE: "archive",
    Stage.MOVE: "archive",
    Stage.VERIFY: "verify",
    Stage.RETRIEVE: "retrieve",
}
"""Stages that move payload, and which way."""

_WINDOW_S = 10.0
_STEP_S = 0.5
_KEPT = 4096  # stages under way; one that was cancelled tells no end
_KEPT_RATES = 256  # of datasets and stages: many more than are in work, a few hundred bytes each


class Rate:
    """Bytes per second over the last seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._steps: deque[tuple[float, int]] = deque()
        self._sum_bytes = 0

    def add(self, size_bytes: int) -> None:
        """So many bytes arrived just now."""
        now_s = self._clock()
        self._forget(now_s)
        if self._steps and now_s - self._steps[-1][0] < _STEP_S:
            at_s, before_bytes = self._steps[-1]
            self._steps[-1] = (at_s, before_bytes + size_bytes)
        else:
            self._steps.append((now_s, size_bytes))
        self._sum_bytes += size_bytes

    def bytes_per_s(self) -> float:
        """The mean of the last seconds, or since the first byte of them."""
        now_s = self._clock()
        self._forget(now_s)
        if not self._steps:
            return 0.0
        return self._sum_bytes / max(now_s - self._steps[0][0], 1.0)

    def _forget(self, now_s: float) -> None:
        while self._steps and now_s - self._steps[0][0] > _WINDOW_S:
            self._sum_bytes -= self._steps.popleft()[1]


class ByteMeter:
    """Adds up what progress events tell; belongs to one event loop."""

    def __init__(
        self,
        on_bytes: Callable[[Stage, int], None] = lambda _stage, _size_bytes: None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``on_bytes`` is told the stage and the bytes that were done since the last event."""
        self._on_bytes, self._clock = on_bytes, clock
        self._done: OrderedDict[tuple[str, int, Stage], int] = OrderedDict()
        self._directions = {direction: Rate(clock) for direction in DIRECTIONS.values()}
        self._datasets: OrderedDict[tuple[str, str], Rate] = OrderedDict()

    def tell(self, event: Progress) -> None:
        """Takes one event."""
        direction = DIRECTIONS.get(event.stage)
        if direction is None or event.state == "waiting":
            return
        key = (event.dataset_id, event.datablock, event.stage)
        before_bytes = self._done.pop(key, 0)
        if event.state == "started":
            self._done[key] = event.done_bytes
        elif event.state != "failed":
            if event.state == "progress":
                self._done[key] = max(event.done_bytes, before_bytes)
            self._count(event, direction, event.done_bytes - before_bytes)
        while len(self._done) > _KEPT:
            self._done.popitem(last=False)

    def rates(self) -> dict[str, float]:
        """Bytes per second by direction."""
        return {direction: rate.bytes_per_s() for direction, rate in self._directions.items()}

    def rate_of(self, dataset_id: str, stage: str) -> float:
        """Bytes per second of a dataset in one of its stages."""
        rate = self._datasets.get((dataset_id, stage))
        return rate.bytes_per_s() if rate else 0.0

    def _count(self, event: Progress, direction: str, size_bytes: int) -> None:
        if size_bytes <= 0:
            return
        self._on_bytes(event.stage, size_bytes)
        self._directions[direction].add(size_bytes)
        key = (event.dataset_id, str(event.stage))
        rate = self._datasets.pop(key, None) or Rate(self._clock)
        self._datasets[key] = rate
        rate.add(size_bytes)
        while len(self._datasets) > _KEPT_RATES:
            self._datasets.popitem(last=False)
