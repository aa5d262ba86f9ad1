"""The four limits: bounded, fair, visible, changeable while in use."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from mover.policies.limits import Limit, Limits

pytestmark = pytest.mark.anyio


async def settle() -> None:
    """Lets every task run until it waits for something."""
    for _ in range(20):
        await anyio.lowlevel.checkpoint()


class Users:
    """Tasks that each hold a slot until they are told to leave."""

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.order: list[str] = []
        self.leave: dict[str, anyio.Event] = {}

    async def use(self, name: str) -> None:
        async with self.limit.slot(name):
            self.order.append(name)
            self.leave[name] = anyio.Event()
            await self.leave[name].wait()


async def test_slots_are_bounded_served_in_order_and_shown() -> None:
    limit = Limit("VERIFY_LTS_LIMIT", 2)
    users = Users(limit)
    async with anyio.create_task_group() as tasks:
        for name in "abcd":
            tasks.start_soon(users.use, name)
            await settle()
        seen = limit.statistics()
        assert (seen.name, seen.slots, seen.holders, seen.waiting) == ("VERIFY_LTS_LIMIT", 2, ("a", "b"), 2)
        for leaving in "bacd":
            users.leave[leaving].set()
            await settle()
            assert len(limit.statistics().holders) <= 2
    assert users.order == list("abcd")
    assert (limit.statistics().peak, limit.statistics().holders) == (2, ())


async def test_a_cancelled_wait_and_a_failed_holder_give_their_slots_back() -> None:
    limit = Limit("x", 1)
    users = Users(limit)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(users.use, "holder")
        await settle()
        with anyio.move_on_after(0):
            await users.use("cancelled")
        users.leave["holder"].set()
    with pytest.raises(ValueError, match="inside"):
        async with limit.slot("fails"):
            raise ValueError("inside")
    async with limit.slot("next"):
        assert limit.statistics().holders == ("next",)
    assert limit.statistics().waiting == 0


async def test_raising_a_limit_lets_waiters_in_and_lowering_it_lets_holders_finish() -> None:
    limit = Limit("x", 1)
    users = Users(limit)
    async with anyio.create_task_group() as tasks:
        for name in "abc":
            tasks.start_soon(users.use, name)
            await settle()
        limit.resize(3)
        await settle()
        assert users.order == list("abc")
        limit.resize(1)
        tasks.start_soon(users.use, "d")
        for name in "ab":
            users.leave[name].set()
            await settle()
            assert "d" not in users.order
        users.leave["c"].set()
        await settle()
        assert users.order == list("abcd")
        users.leave["d"].set()
    assert limit.statistics().slots == 1


async def test_one_holder_name_may_hold_several_slots() -> None:
    limit = Limit("x", 2)
    async with limit.slot("same"), limit.slot("same"):
        assert limit.statistics().holders == ("same", "same")
    assert limit.statistics().holders == ()


def test_the_four_limits_have_their_documented_names_and_defaults() -> None:
    assert [(limit.name, limit.slots) for limit in Limits().statistics()] == [
        ("LTS_FREE_LIMIT", 1),
        ("MOVE_TO_LTS_LIMIT", 2),
        ("VERIFY_LTS_LIMIT", 1),
        ("LTS_TO_RETRIEVAL_LIMIT", 1),
    ]
