"""Calls that may never return, and the threads that make them."""

from __future__ import annotations

import math
import threading

import anyio
import pytest

from mover.streams.abandon import run_abandonable

pytestmark = pytest.mark.anyio


async def test_calls_one_after_the_other_are_made_by_threads_that_are_there() -> None:
    threads = {await run_abandonable(threading.get_native_id, math.inf) for _ in range(200)}

    assert len(threads) < 20
    assert threading.get_native_id() not in threads


async def test_a_call_that_hangs_keeps_its_thread_to_itself() -> None:
    go_on, hanging = threading.Event(), []

    def hang() -> None:
        hanging.append(threading.get_native_id())
        go_on.wait(30)

    with pytest.raises(TimeoutError):
        await run_abandonable(hang, 0.05)
    with anyio.fail_after(10):
        others = {await run_abandonable(threading.get_native_id, math.inf) for _ in range(50)}
    go_on.set()

    assert others.isdisjoint(hanging)
