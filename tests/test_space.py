"""The space gate: nothing is promised twice, nobody starves, every wait has a reason and an end."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mover.errors import ExitCode, NotEnoughSpaceError
from mover.policies.space import Reservation, SpaceGate, SpaceReading

pytestmark = pytest.mark.anyio


class Share:
    """A share of 1,000 bytes with virtual time; each sleep runs the next step."""

    def __init__(self, free_bytes: int, *steps: Callable[[], object]) -> None:
        self.free_bytes = free_bytes
        self.steps = list(steps)
        self.now = 0.0
        self.waits: list[float] = []
        self.reasons: list[str] = []
        self.gate = SpaceGate(self.reading, 20, deadline_s=100, sleep=self.sleep, clock=lambda: self.now)

    async def reading(self) -> SpaceReading:
        free_bytes = self.free_bytes
        await anyio.lowlevel.checkpoint()
        return SpaceReading(1000, free_bytes)

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.waits.append(seconds)
        if self.steps:
            self.steps.pop(0)()
        await anyio.lowlevel.checkpoint()

    def on_wait(self, reason: str, _waited_s: float) -> None:
        self.reasons.append(reason)

    def set_free(self, free_bytes: int) -> None:
        self.free_bytes = free_bytes


async def test_the_floor_stays_free_to_the_byte() -> None:
    share = Share(700)
    async with share.gate.admit(500):
        assert share.waits == []
    share.steps = [lambda: share.set_free(701)]
    async with share.gate.admit(501, share.on_wait):
        assert share.waits == [1]
    assert share.reasons == ["the LTS lacks 1 of 501 bytes"]


async def test_what_is_reserved_is_not_promised_again_until_it_is_released() -> None:
    share = Share(1000)
    async with share.gate.admit(500):
        assert share.gate.statistics().reserved_bytes == 500
        with pytest.raises(NotEnoughSpaceError) as caught:
            async with share.gate.admit(301):
                pytest.fail("promised twice")
        assert (caught.value.reserved_bytes, caught.value.exit_code) == (500, ExitCode.SPACE)
        async with share.gate.admit(300):
            assert share.gate.statistics().reservations == 2
    assert share.gate.statistics().reserved_bytes == 0


async def test_written_bytes_are_not_counted_twice() -> None:
    share = Share(1000)
    async with share.gate.admit(400) as first:
        share.free_bytes = 600  # preallocated
        first.shrink_to(0)
        async with share.gate.admit(400):
            assert share.waits == []


async def test_bytes_written_during_a_reading_are_not_lost_from_the_count() -> None:
    share = Share(1000)
    writing: list[Reservation] = []

    async def stale_reading() -> SpaceReading:
        reading = await share.reading()
        if writing:
            share.free_bytes = 500  # the first one writes all of it after the numbers were taken
            writing.pop().shrink_to(0)
        return reading

    gate = SpaceGate(stale_reading, 20, deadline_s=100, sleep=share.sleep, clock=lambda: share.now)
    async with gate.admit(500) as first:
        writing.append(first)
        with pytest.raises(NotEnoughSpaceError):
            async with gate.admit(400):
                pytest.fail("the share has 500 bytes, 200 must stay free")


async def test_a_datablock_that_can_never_fit_fails_at_once() -> None:
    share = Share(0)
    with pytest.raises(NotEnoughSpaceError):
        async with share.gate.admit(801):
            pytest.fail("larger than the share")
    assert share.waits == []


async def test_the_deadline_ends_the_wait_after_a_last_look() -> None:
    share = Share(0)
    with pytest.raises(NotEnoughSpaceError) as caught:
        async with share.gate.admit(10, share.on_wait):
            pytest.fail("no space")
    assert sum(share.waits) == 100
    assert caught.value.waited_s == 100
    assert share.waits[:4] == [1, 2, 4, 8]
    assert share.gate.statistics() == type(share.gate.statistics())(0, 0, 0)


async def test_a_large_datablock_is_not_overtaken_by_small_ones() -> None:
    share = Share(600)
    order: list[str] = []

    async def take(name: str, size_bytes: int) -> None:
        async with share.gate.admit(size_bytes, share.on_wait):
            order.append(name)

    async with anyio.create_task_group() as tasks:
        share.steps = [lambda: tasks.start_soon(take, "small", 10), lambda: None, lambda: share.set_free(1000)]
        tasks.start_soon(take, "large", 700)
        tasks.start_soon(take, "medium", 100)
    assert order[0] == "large"
    assert sorted(order) == ["large", "medium", "small"]
    assert any("wait for space on the LTS first" in reason for reason in share.reasons)


async def test_a_failed_or_cancelled_holder_gives_its_space_back() -> None:
    share = Share(1000)
    with pytest.raises(RuntimeError):
        async with share.gate.admit(100):
            raise RuntimeError
    with anyio.CancelScope() as scope:
        async with share.gate.admit(100):
            scope.cancel()
            await anyio.sleep_forever()
    share.free_bytes = 0
    scope_waiting = anyio.CancelScope()
    share.steps = [scope_waiting.cancel]
    with scope_waiting:
        async with share.gate.admit(100):
            pytest.fail("no space")
    assert share.gate.statistics() == type(share.gate.statistics())(0, 0, 0)
    share.free_bytes = 1000
    async with share.gate.admit(100):
        pass


@given(st.integers(0, 1000), st.lists(st.integers(-10, 1100)))
def test_a_reservation_never_grows_and_never_goes_below_nothing(size_bytes: int, steps: list[int]) -> None:
    reservation = Reservation(size_bytes)
    for step in steps:
        before = reservation.remaining_bytes
        reservation.shrink_to(step)
        assert 0 <= reservation.remaining_bytes <= before
