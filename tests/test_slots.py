"""The lease of a running stage: kept through failures; the stage stops before the server may lend the slot again."""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID, uuid4

import anyio
import anyio.lowlevel
import httpx
import pytest

from flows.slots import LEASE_S, SlotLostError, kept_alive

pytestmark = pytest.mark.anyio

LEASE = uuid4()
REQUEST = httpx.Request("POST", "http://prefect/renew")


class Server:
    """Renews leases on a clock of its own, which only sleeps move; ``trouble`` is asked before each renewal."""

    def __init__(self, trouble: Callable[[float], Exception | None] = lambda _: None) -> None:
        self.now_s, self.renewed_s = 0.0, [0.0]
        self._trouble = trouble
        self.asked = 0

    async def renew(self, lease_id: UUID) -> None:
        assert lease_id == LEASE
        self.asked += 1
        error = self._trouble(self.now_s)
        if error is not None:
            raise error
        assert self.now_s - self.renewed_s[-1] < LEASE_S, "the lease had run out"
        self.renewed_s.append(self.now_s)

    async def sleep(self, pause_s: float) -> None:
        self.now_s += pause_s
        await anyio.lowlevel.checkpoint()

    async def work_until(self, end_s: float, asked_s: float | None = None) -> None:
        """Holds the lease until the clock says ``end_s``."""
        holding = kept_alive(LEASE, asked_s=asked_s, renew=self.renew, sleep=self.sleep, clock=lambda: self.now_s)
        async with holding:
            while self.now_s < end_s:
                await anyio.lowlevel.checkpoint()


def answered(status: int) -> httpx.HTTPStatusError:
    return httpx.HTTPStatusError("", request=REQUEST, response=httpx.Response(status, request=REQUEST))


async def test_a_lease_is_renewed_long_before_it_ends_for_as_long_as_the_stage_runs() -> None:
    server = Server()
    await server.work_until(1000.0)
    gaps = [after - before for before, after in zip(server.renewed_s[:-1], server.renewed_s[1:], strict=True)]
    assert max(gaps) <= LEASE_S / 3


@pytest.mark.parametrize("error", [httpx.ConnectError("away"), answered(503), answered(500)])
async def test_a_server_that_is_away_for_less_than_the_lease_costs_the_stage_nothing(error: Exception) -> None:
    server = Server(lambda now_s: error if 100 < now_s < 130 else None)
    await server.work_until(300.0)
    assert any(130 <= moment_s <= 135 for moment_s in server.renewed_s)


async def test_a_stage_stops_before_its_slot_may_go_to_somebody_else() -> None:
    server = Server(lambda now_s: httpx.ConnectError("away") if now_s > 100 else None)
    with pytest.raises(SlotLostError, match="ConnectError"):
        await server.work_until(1000.0)
    assert LEASE_S / 2 < server.now_s - server.renewed_s[-1] < LEASE_S


async def test_a_lease_that_the_server_no_longer_knows_stops_the_stage_at_once() -> None:
    server = Server(lambda now_s: answered(410) if now_s > 100 else None)
    with pytest.raises(SlotLostError, match="run out"):
        await server.work_until(1000.0)
    assert server.now_s - server.renewed_s[-1] <= LEASE_S / 3


async def test_a_lease_handed_on_counts_from_when_it_was_asked_for() -> None:
    server = Server(lambda _: httpx.ConnectError("away"))
    server.now_s = 40.0
    with pytest.raises(SlotLostError):
        await server.work_until(1000.0, asked_s=0.0)
    assert server.now_s < LEASE_S


async def test_a_renewal_without_an_answer_does_not_outlast_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.slots.LEASE_S", 10.2)  # 0.2 s to the margin

    async def silent(_: UUID) -> None:
        await anyio.sleep_forever()

    with anyio.fail_after(30), pytest.raises(SlotLostError, match="does not answer"):
        async with kept_alive(LEASE, renew=silent):
            await anyio.sleep_forever()


async def test_a_slot_that_was_lost_is_worth_another_try() -> None:
    assert SlotLostError("any").retryable
