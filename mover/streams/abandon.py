"""Blocking calls that may never return, made under a deadline.

A read from tape or from a dead NFS server can block for ever and cannot be interrupted. Such a call gets a daemon
thread to itself: it takes no place from the worker threads that others share, and does not keep the process alive.
A thread whose call has ended takes the next one: to start a thread is to wait until it runs, and so holds up the loop.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Generic, TypeVar

import anyio

__all__ = ["run_abandonable"]

T = TypeVar("T")

_IDLE_THREADS: Final = 16  # that are kept at most


class _Call(Generic[T]):
    """One call in its thread; its outcome is either taken by the waiter or, once abandoned, disposed of."""

    def __init__(self, call: Callable[[], T], dispose: Callable[[T], None] | None) -> None:
        self._call = call
        self._dispose = dispose
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._ended = False
        self._abandoned = False
        self._error: BaseException | None = None
        self._results: list[T] = []
        self.finished = anyio.Event()

    def run(self) -> None:
        try:
            self._results.append(self._call())
        except BaseException as error:  # noqa: BLE001 - raised again in `take`
            self._error = error
        with self._lock:
            self._ended = True
            if not self._abandoned:
                with suppress(RuntimeError):  # the loop is closed, nobody waits
                    self._loop.call_soon_threadsafe(self.finished.set)
                return
        self._throw_away()

    def abandon(self) -> None:
        with self._lock:
            self._abandoned = True
            ended = self._ended
        if ended:
            self._throw_away()

    def take(self) -> T:
        if self._error is not None:
            raise self._error
        return self._results.pop()

    def _throw_away(self) -> None:
        if self._dispose is not None and self._results:
            self._dispose(self._results.pop())


class _Thread:
    """Makes calls, one after the other; between them it is in ``idle``."""

    idle: Final[list[_Thread]] = []

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[_Call[Any]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="mover-abandonable", daemon=True).start()

    @classmethod
    def make(cls, call: _Call[Any]) -> None:
        """Hands a call to a thread that has none."""
        try:
            thread = cls.idle.pop()
        except IndexError:
            thread = cls()
        thread._calls.put(call)

    def _run(self) -> None:
        while True:
            self._calls.get().run()  # nothing here holds on to the call, nor to its result
            if len(self.idle) >= _IDLE_THREADS:
                return
            self.idle.append(self)


async def run_abandonable(
    call: Callable[[], T],
    timeout_s: float,
    *,
    dispose: Callable[[T], None] | None = None,
    on_tick: Callable[[], None] | None = None,
    tick_s: float = 10.0,
) -> T:
    """The result of a blocking ``call``, made in a thread that does nothing else meanwhile.

    After ``timeout_s`` seconds, or when cancelled, the call is left behind: it goes on until the system lets it go, so
    it must touch nothing that others use. A result that comes too late goes to ``dispose``, on whichever thread.
    ``on_tick`` is called every ``tick_s`` seconds while it lasts.

    Raises:
        TimeoutError: the deadline passed.
    """
    job = _Call(call, dispose)
    _Thread.make(job)
    try:
        with anyio.fail_after(timeout_s):
            while not job.finished.is_set():
                with anyio.move_on_after(tick_s) as tick:
                    await job.finished.wait()
                if tick.cancelled_caught and on_tick is not None:
                    on_tick()
    except BaseException:  # the deadline, or whatever cancels the caller
        job.abandon()
        raise
    return job.take()
