"""Events of jobs, from the engine's progress to any number of readers, none of which can hold up the work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import anyio

from mover.api import JobEvent
from mover.model import Progress

__all__ = ["EventHub", "ProgressRelay", "Subscription"]

_KEPT_CHANGES: Final = 10_000


class ProgressRelay:
    """Hands the engine's progress to whoever has subscribed; ``tell`` is what ``Engine.open`` takes."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[Progress], None]] = []

    def tell(self, event: Progress) -> None:
        """Calls all listeners, on the event loop."""
        for listener in tuple(self._listeners):
            listener(event)

    def subscribe(self, listener: Callable[[Progress], None]) -> Callable[[], None]:
        """From now on ``listener`` is called for every event, and must return at once. Returns how to end that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)


class Subscription:
    """What one reader has not taken yet: changes in full, of progress the latest of each dataset.

    ``lost``: changes that were dropped because the reader was too far behind.
    """

    def __init__(self) -> None:
        self.lost = 0
        self._changes: deque[JobEvent] = deque()
        self._progress: dict[tuple[str, str], JobEvent] = {}
        self._wake = anyio.Event()

    def offer(self, event: JobEvent) -> None:
        """Adds an event; never waits."""
        if event.type == "progress" and event.dataset is not None:
            self._progress[event.job_id, event.dataset.dataset_id] = event
        else:
            self._changes.append(event)
            if len(self._changes) > _KEPT_CHANGES:
                self._changes.popleft()
                self.lost += 1
        self._wake.set()

    async def take(self) -> list[JobEvent]:
        """All that has come since the last time, in the order of the numbers; waits for something."""
        await self._wake.wait()
        self._wake = anyio.Event()
        events = sorted([*self._changes, *self._progress.values()], key=lambda event: event.number)
        self._changes.clear()
        self._progress.clear()
        return events


class EventHub:
    """Who reads which job's events."""

    def __init__(self) -> None:
        self._by_job: dict[str, list[Subscription]] = {}
        self._all: list[Subscription] = []

    def publish(self, event: JobEvent) -> None:
        """Offers an event to its readers."""
        for subscription in (*self._by_job.get(event.job_id, ()), *self._all):
            subscription.offer(event)

    def wanted(self, job_id: str) -> bool:
        """Whether anybody reads the job's events."""
        return bool(self._all) or job_id in self._by_job

    @contextmanager
    def subscribed(self, job_id: str = "") -> Iterator[Subscription]:
        """A subscription to one job's events, or to all."""
        subscription = Subscription()
        readers = self._by_job.setdefault(job_id, []) if job_id else self._all
        readers.append(subscription)
        try:
            yield subscription
        finally:
            readers.remove(subscription)
            if job_id and not readers:
                self._by_job.pop(job_id, None)
