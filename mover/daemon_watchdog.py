"""Watches the event loop from a thread of its own: a loop that is blocked cannot say so itself.

The loop gives a sign of life several times a second. When none comes for a while, the thread logs where the loop
stands, and withholds the sign of life that the service manager waits for: it restarts the daemon if that goes on.
It also sees to it that threads which move bytes give way to the loop.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import anyio
import msgspec

from mover.daemon_notify import Notifier
from mover.daemon_priority import PROMPT, give_way
from mover.tasks import open_task_group

__all__ = ["Liveness", "LoopState", "LoopWatchdog"]

_log = logging.getLogger(__name__)

_BEAT_S = 0.1
_LOOK_S = 0.5
_RECENT_S = 60.0
_STOOD_STILL = 0.1
"""Processor time per second below which a process was stopped; one whose loop holds the interpreter is at work."""


class LoopState(msgspec.Struct, frozen=True):
    """The loop's health: how late its timers are, and since when and where it was blocked.

    ``lag_s``: the last timer; ``worst_lag_s``: the worst one of the last minute or two. ``blocked``: how often it was
    blocked for longer than ``blocked_after_s``; ``blocked_s``: in sum; the others tell of the last time.
    """

    lag_s: float
    worst_lag_s: float
    blocked_after_s: float
    blocked: int = 0
    blocked_s: float = 0.0
    last_blocked_at: str = ""
    last_blocked_s: float = 0.0
    last_blocked_in: str = ""


class Liveness(msgspec.Struct, frozen=True):
    """That this is answered says that the loop lives; ``loop`` says how well."""

    alive: bool
    summary: str
    loop: LoopState


class LoopWatchdog:
    """Use :meth:`watching` on the loop that is to be watched."""

    def __init__(
        self,
        notifier: Notifier,
        *,
        blocked_after_s: float = 5.0,
    ) -> None:
        self._notifier, self._blocked_after_s = notifier, blocked_after_s
        self.on_lag: Callable[[float], None] = lambda _: None
        """Told on the loop, several times a second, by how many seconds a timer was late."""
        self._thread_id = self._native_id = 0
        self._beat_s = time.monotonic()
        self._lag_s = 0.0
        self._worst = (0.0, 0.0)  # of this span and of the one before
        self._span_began_s = self._beat_s
        self._blocked = 0
        self._blocked_s = self._last_blocked_s = 0.0
        self._last_blocked_at = self._last_blocked_in = ""
        self._ended = threading.Event()

    def state(self) -> LoopState:
        """As it is now; from any thread."""
        return LoopState(
            self._lag_s,
            max(self._worst),
            self._blocked_after_s,
            self._blocked,
            self._blocked_s,
            self._last_blocked_at,
            self._last_blocked_s,
            self._last_blocked_in,
        )

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Watches the running loop inside the block."""
        self._thread_id, self._native_id = threading.get_ident(), threading.get_native_id()
        self._beat_s = time.monotonic()
        thread = threading.Thread(target=self._watch, name=f"{PROMPT}-watchdog", daemon=True)
        thread.start()
        try:
            async with open_task_group() as tasks:
                tasks.start_soon(self._beat)
                yield
                tasks.cancel_scope.cancel()
        finally:
            self._ended.set()  # the thread sees it within half a second, and is not waited for

    async def _beat(self) -> None:
        while True:
            due_s = time.monotonic() + _BEAT_S
            await anyio.sleep(_BEAT_S)
            self._beat_s = time.monotonic()
            self._lag_s = max(0.0, self._beat_s - due_s)
            if self._beat_s - self._span_began_s > _RECENT_S:
                self._worst, self._span_began_s = (0.0, self._worst[0]), self._beat_s
            self._worst = (max(self._worst[0], self._lag_s), self._worst[1])
            self.on_lag(self._lag_s)

    def _watch(self) -> None:
        told_s = 0.0
        blocked_at_s: float | None = None  # the last beat before the loop was found blocked
        period_s = self._notifier.watchdog_s / 3
        look_s = min(_LOOK_S, period_s or _LOOK_S)
        looked_s, worked_s = time.monotonic(), time.process_time()
        while not self._ended.wait(look_s):
            give_way(self._native_id)
            now_s = time.monotonic()
            late_s = now_s - looked_s - look_s  # this thread did not run, either
            if late_s > self._blocked_after_s / 2 and time.process_time() - worked_s < late_s * _STOOD_STILL:
                _log.warning("the whole process stood still for %.1f s", late_s)
                self._beat_s = now_s
            looked_s, worked_s, beat_s = now_s, time.process_time(), self._beat_s
            silent_s = now_s - beat_s
            if blocked_at_s is not None and beat_s != blocked_at_s:
                self._freed(beat_s - blocked_at_s)
                blocked_at_s = None
            if silent_s > self._blocked_after_s:
                if blocked_at_s is None:
                    self._found_blocked(silent_s)
                    blocked_at_s = beat_s
                self._last_blocked_s = silent_s
            elif period_s and now_s - told_s >= period_s:
                self._notifier.alive()
                told_s = now_s

    def _found_blocked(self, silent_s: float) -> None:
        frame = sys._current_frames().get(self._thread_id)  # noqa: SLF001 - the one way to another thread's stack
        stack = traceback.extract_stack(frame) if frame is not None else traceback.StackSummary()
        self._blocked += 1
        self._last_blocked_at = datetime.now(UTC).isoformat(timespec="milliseconds")
        ours = [entry for entry in stack if f"{os.sep}mover{os.sep}" in entry.filename] or list(stack)
        self._last_blocked_in = f"{ours[-1].name} ({ours[-1].filename}:{ours[-1].lineno})" if ours else ""
        _log.error(
            "the event loop is blocked: no sign of life for %.1f s; it stands in\n%s",
            silent_s,
            "".join(traceback.format_list(stack)),
        )

    def _freed(self, blocked_s: float) -> None:
        self._last_blocked_s = blocked_s
        self._blocked_s += blocked_s
        _log.warning("the event loop goes on, after %.1f s", blocked_s)
