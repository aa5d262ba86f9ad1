"""Events of jobs, from the engine's progress to any number of readers, none of which can hold up the work."""

from __future__ import annotations

from collections.abc import Callable

from mover.model import Progress

__all__ = ["ProgressRelay"]


class ProgressRelay:
    """Hands the engine's progress to whoever has subscribed; ``tell`` is what ``Engine.open`` takes."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[Progress], None]] = []

    def tell(self, event: Progress) -> None:
        """Calls all listeners, on the event loop."""
        for listener in self._listeners:
            listener(event)

    def subscribe(self, listener: Callable[[Progress], None]) -> Callable[[], None]:
        """From now on ``listener`` is called for every event, and must return at once. Returns how to end that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)
