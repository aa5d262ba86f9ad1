"""The pool of bytes: a bound that holds, fair, and free of leaks when its users are cancelled."""

from __future__ import annotations

import ctypes
import mmap
import random

import anyio
import anyio.lowlevel
import pytest

from mover.errors import ConfigError
from mover.streams.memory import BufferPool

pytestmark = pytest.mark.anyio

MIB = 1 << 20


async def settle() -> None:
    """Lets every task run until it waits for something."""
    for _ in range(20):
        await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("seed", range(4))
async def test_random_users_some_of_them_cancelled_never_hold_more_than_the_limit(seed: int) -> None:
    rng = random.Random(seed)
    limit_bytes = 4 * MIB
    pool = BufferPool(limit_bytes)
    held_bytes = served = 0

    async def use(size_bytes: int, *, lease: bool, turns: int) -> None:
        nonlocal held_bytes, served
        async with pool.lease(size_bytes) if lease else pool.reserve(size_bytes):
            held_bytes += size_bytes
            assert held_bytes <= pool.statistics().used_bytes <= limit_bytes
            assert pool._idle_bytes + held_bytes <= limit_bytes, "what is kept for reuse counts"  # noqa: SLF001
            try:
                for _ in range(turns):
                    await anyio.lowlevel.checkpoint()
                served += 1
            finally:
                held_bytes -= size_bytes

    async def use_or_be_cancelled() -> None:
        size_bytes = rng.choice([0, 1, 4096, MIB, MIB, 2 * MIB, rng.randrange(limit_bytes + 1)])
        with anyio.CancelScope() as scope:
            if rng.random() < 0.3:
                tasks.start_soon(cancel_later, scope, rng.randrange(30))
            await use(size_bytes, lease=rng.random() < 0.5, turns=rng.randrange(8))

    async def cancel_later(scope: anyio.CancelScope, turns: int) -> None:
        for _ in range(turns):
            await anyio.lowlevel.checkpoint()
        scope.cancel()

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            for _ in range(200):
                tasks.start_soon(use_or_be_cancelled)
    assert served > 60
    statistics = pool.statistics()
    assert (statistics.used_bytes, statistics.waiting) == (0, 0)
    assert statistics.peak_bytes <= limit_bytes
    async with pool.reserve(limit_bytes):
        assert pool._idle_bytes == 0, "idle buffers make room"  # noqa: SLF001


async def test_requests_are_served_in_the_order_they_came_and_a_large_one_is_not_overtaken() -> None:
    pool = BufferPool(10)
    served: list[str] = []

    async def use(name: str, size_bytes: int) -> None:
        async with pool.reserve(size_bytes):
            served.append(name)

    async with anyio.create_task_group() as tasks, pool.reserve(6):
        for name, size_bytes in (("large", 10), ("small", 1), ("smaller", 0)):
            tasks.start_soon(use, name, size_bytes)
            await settle()
        assert served == []
        assert pool.statistics().waiting == 3
    assert served == ["large", "small", "smaller"]


async def test_a_cancelled_wait_lets_the_next_one_in_at_once() -> None:
    pool = BufferPool(10)
    served = anyio.Event()

    async def use_all() -> None:
        async with pool.reserve(10):
            raise AssertionError

    async def use_some() -> None:
        async with pool.reserve(4):
            served.set()

    async with pool.reserve(6), anyio.create_task_group() as tasks:
        async with anyio.create_task_group() as doomed:
            doomed.start_soon(use_all)
            await settle()
            tasks.start_soon(use_some)
            await settle()
            assert not served.is_set()
            doomed.cancel_scope.cancel()
        with anyio.fail_after(1):
            await served.wait()


async def test_bytes_granted_to_a_task_that_is_cancelled_at_that_moment_are_given_back() -> None:
    pool = BufferPool(10)

    async def use_all() -> None:
        async with pool.reserve(10):
            await anyio.sleep_forever()

    async with anyio.create_task_group() as tasks:
        async with pool.reserve(1):
            tasks.start_soon(use_all)
            await settle()
        assert pool.statistics().used_bytes == 10, "granted, but the task has not run yet"
        tasks.cancel_scope.cancel()
    assert pool.statistics().used_bytes == 0


async def test_a_request_that_can_never_fit_names_the_setting() -> None:
    pool = BufferPool(2 * MIB)
    with pytest.raises(ConfigError, match="MOVER_BUFFER_MB=2: allowed is at least 3"):
        async with pool.lease(2 * MIB + 1):
            pass


async def test_leased_buffers_are_page_aligned_writable_and_used_again() -> None:
    pool = BufferPool(4 * MIB)
    addresses = []
    for _ in range(3):
        async with pool.lease(MIB) as view:
            assert view.nbytes == MIB
            view[-1] = 1
            addresses.append(ctypes.addressof(ctypes.c_char.from_buffer(view)))
    assert len(set(addresses)) == 1
    assert addresses[0] % mmap.PAGESIZE == 0


async def test_kept_buffers_are_dropped_when_others_need_the_bytes() -> None:
    pool = BufferPool(4 * MIB)
    async with pool.lease(MIB), pool.lease(2 * MIB):
        pass
    assert pool._idle_bytes == 3 * MIB  # noqa: SLF001
    async with pool.reserve(2 * MIB):
        assert pool._idle_bytes <= 2 * MIB  # noqa: SLF001
