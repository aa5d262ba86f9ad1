"""Task groups that fail with one error of the tree, not with a group of them."""

from __future__ import annotations

import asyncio
import random

import anyio
import anyio.lowlevel
import pytest

from mover.errors import LtsError, StallError
from mover.tasks import let_finish, open_task_group, side_by_side

pytestmark = pytest.mark.anyio


async def fail(error: BaseException) -> None:
    raise error


async def test_the_first_failure_is_raised_bare_with_its_cause() -> None:
    error = StallError("GET", "s3://b/k", 1)
    error.__cause__ = OSError("below")
    with pytest.raises(StallError) as caught:  # noqa: PT012 - the group is what is tested
        async with open_task_group() as outer:
            async with open_task_group() as inner:
                inner.start_soon(fail, error)
                await anyio.sleep_forever()
            outer.cancel_scope.cancel()
    assert caught.value is error
    assert str(caught.value.__cause__) == "below"


async def test_further_failures_become_notes() -> None:
    with pytest.raises(LtsError, match="first") as caught:  # noqa: PT012 - the group is what is tested
        async with open_task_group() as tasks:
            tasks.start_soon(fail, LtsError("write", "a", "first"))
            tasks.start_soon(fail, LtsError("write", "b", "second"))
    assert caught.value.__notes__ == ["besides: write b: second"]


async def test_a_failure_of_the_body_is_raised_bare_too() -> None:
    with pytest.raises(LtsError):  # noqa: PT012 - the group is what is tested
        async with open_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            raise LtsError("write", "a", "x")


async def test_a_bug_is_never_hidden_behind_an_expected_error() -> None:
    with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012 - the group is what is tested
        async with open_task_group() as tasks:
            tasks.start_soon(fail, LtsError("write", "a", "x"))
            tasks.start_soon(fail, ZeroDivisionError())
    assert caught.group_contains(ZeroDivisionError)


async def test_cancellation_from_outside_passes_through() -> None:
    with anyio.move_on_after(0.01) as scope:
        async with open_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
    assert scope.cancelled_caught


async def test_a_host_stays_cancelled_when_all_tasks_of_the_loop_are_cancelled_while_it_cleans_up() -> None:
    """As a runner does it when the process is told to end."""
    went_on = False

    async def cleaning_up() -> None:
        nonlocal went_on
        async with open_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            try:
                await anyio.sleep_forever()
            finally:
                host.uncancel()  # as libraries do
                await anyio.sleep(0.01)
        went_on = True

    before = asyncio.all_tasks()
    host = asyncio.ensure_future(cleaning_up())
    for _ in range(3):
        await anyio.lowlevel.checkpoint()
    for task in asyncio.all_tasks() - before:
        task.cancel()
    done, _ = await asyncio.wait([host])

    assert host in done
    assert host.cancelled()
    assert not went_on


async def test_a_group_that_its_own_body_cancels_ends_in_peace() -> None:
    async with open_task_group() as tasks:
        tasks.start_soon(anyio.sleep_forever)
        tasks.cancel_scope.cancel()
        await anyio.sleep_forever()


async def test_a_cancelled_scope_around_a_group_ends_in_peace() -> None:
    with anyio.CancelScope() as scope:
        async with open_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            scope.cancel()
            try:
                await anyio.sleep_forever()
            finally:
                tasks.cancel_scope.cancel()
    assert scope.cancelled_caught


async def test_items_are_done_side_by_side_and_more_of_them_once_there_is_room() -> None:
    begun: list[int] = []
    gate, changed, width = anyio.Event(), anyio.Event(), 2

    async def call(item: int) -> None:
        begun.append(item)
        await gate.wait()

    async def widen() -> None:
        nonlocal width, changed
        await anyio.wait_all_tasks_blocked()
        assert begun == [0, 1]
        width = 5
        before, changed = changed, anyio.Event()
        before.set()
        await anyio.wait_all_tasks_blocked()
        assert begun == [0, 1, 2, 3, 4]
        gate.set()

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(widen)
            await side_by_side(range(7), call, lambda: width, lambda: changed)
        await side_by_side((), call, lambda: width)
    assert begun == list(range(7))


async def test_one_that_fails_ends_those_beside_it() -> None:
    async def call(item: int) -> None:
        if item == 2:
            raise LtsError("write", "a", "full")
        await anyio.sleep_forever()

    with anyio.fail_after(10), pytest.raises(LtsError, match="full"):
        await side_by_side(range(9), call, lambda: 3)


async def test_what_was_let_finish_keeps_its_result_whenever_the_cancellation_comes() -> None:
    rng = random.Random(20)
    cut = 0
    for _ in range(300):
        done: list[str] = []
        went_on = False

        async def operation(done: list[str] = done) -> None:
            await anyio.sleep(rng.random() * 0.01)
            done.append("done")

        with anyio.move_on_after(rng.random() * 0.02):
            await let_finish(operation, 5)
            await anyio.lowlevel.checkpoint()
            went_on = True
        assert done == ["done"]
        cut += not went_on
    assert 0 < cut < 300


async def test_what_is_let_finish_is_cut_off_when_its_grace_is_over() -> None:
    with anyio.fail_after(5), anyio.move_on_after(0.01) as scope:
        await let_finish(anyio.sleep_forever, 0.05)
        await anyio.lowlevel.checkpoint()
        pytest.fail("it went on")
    assert scope.cancelled_caught


async def test_what_is_let_finish_may_fail() -> None:
    with pytest.raises(LtsError):
        await let_finish(lambda: fail(LtsError("write", "a", "x")), 5)
