"""Slots of the server's limits: taken from a busy server without delay, handed on, and always given back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import anyio
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.limits import limit_name
from flows.slots import open_slots
from mover.errors import ConfigError, LtsError
from tests.faults import Answer, FaultProxy, Rule
from tests.prefect_servers import PrefectServer

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    # Prefect leaves the connections of its threads to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

TAG = "of-the-slot-tests"
_TAKE = "increment-with-lease"
_GIVE_BACK = "decrement-with-lease"


@asynccontextmanager
async def _limited(server: PrefectServer, slots: int = 1) -> AsyncIterator[FaultProxy]:
    """A limit on the server, which is reached through a proxy."""
    with server.client_settings():
        async with FaultProxy(server.url.removesuffix("/api")) as proxy:
            with temporary_settings({PREFECT_API_URL: f"{proxy.url}/api"}):
                async with get_client() as client:
                    await client.upsert_global_concurrency_limit_by_name(limit_name(TAG), slots)
                yield proxy


async def _taken() -> int:
    async with get_client() as client:
        return (await client.read_global_concurrency_limit_by_name(limit_name(TAG))).active_slots


def _requests(proxy: FaultProxy, what: str) -> int:
    return sum(seen.target.endswith(what) for seen in proxy.seen)


@pytest.mark.slow
async def test_a_server_that_is_busy_for_a_moment_is_asked_again_at_once(prefect_server: PrefectServer) -> None:
    async with _limited(prefect_server) as proxy, open_slots() as slots:
        async with slots.held(TAG, uuid4()):  # opens the connection
            pass
        took_s = []
        for _ in range(3):  # the machine may be busy for a moment as well
            await anyio.sleep(0.3)  # the slot of the one before is back
            proxy.rules += [Rule(Answer(503), target=_TAKE, times=5), Rule(Answer(503), target=_GIVE_BACK, times=5)]
            began_s = anyio.current_time()
            async with slots.held(TAG, uuid4()):
                took_s.append(anyio.current_time() - began_s)
    assert min(took_s) < 1.5
    assert [seen.fault for seen in proxy.seen].count("Answer") == 30


async def test_a_stage_that_follows_at_once_has_the_slot_of_the_one_before(prefect_server: PrefectServer) -> None:
    async with _limited(prefect_server) as proxy:
        async with open_slots() as slots:
            for _ in range(5):
                async with slots.held(TAG, uuid4()):
                    pass
        assert (_requests(proxy, _TAKE), _requests(proxy, _GIVE_BACK)) == (1, 1)
        assert await _taken() == 0


async def test_a_slot_that_nobody_wants_next_goes_back_while_the_run_goes_on(prefect_server: PrefectServer) -> None:
    async with _limited(prefect_server) as proxy, open_slots() as slots:
        async with slots.held(TAG, uuid4()):
            assert await _taken() == 1
        with anyio.fail_after(10):
            await proxy.wait_until(lambda: any(seen.target.endswith(_GIVE_BACK) for seen in proxy.served))
        assert await _taken() == 0


@pytest.mark.slow
async def test_a_slot_that_is_taken_is_waited_for(prefect_server: PrefectServer) -> None:
    async with _limited(prefect_server) as proxy, open_slots() as ours, open_slots() as theirs:
        order = []

        async def wait() -> None:
            async with theirs.held(TAG, uuid4()):
                order.append("theirs")

        async with anyio.create_task_group() as tasks, ours.held(TAG, uuid4()):
            tasks.start_soon(wait)
            with anyio.fail_after(10):
                await proxy.wait_until(lambda: _requests(proxy, _TAKE) >= 2)
            order.append("ours")
        assert order == ["ours", "theirs"]


async def test_a_stage_that_fails_gives_its_slot_back_at_once(prefect_server: PrefectServer) -> None:
    failure = LtsError("write", "/lts/file", "no answer")
    async with _limited(prefect_server), open_slots() as slots:
        with pytest.raises(LtsError):
            async with slots.held(TAG, uuid4()):
                raise failure
        assert await _taken() == 0


async def test_a_stage_that_is_cancelled_while_it_asks_leaves_no_slot_behind(prefect_server: PrefectServer) -> None:
    async with _limited(prefect_server) as proxy, open_slots() as slots:

        async def ask() -> None:
            async with slots.held(TAG, uuid4()):
                await anyio.sleep_forever()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            with anyio.fail_after(10):
                await proxy.wait_until(lambda: _requests(proxy, _TAKE) >= 1)
            tasks.cancel_scope.cancel()
        assert _requests(proxy, _GIVE_BACK) == 1
        assert await _taken() == 0


async def test_a_limit_that_does_not_exist_is_an_error_and_not_no_limit(prefect_server: PrefectServer) -> None:
    async with _limited(prefect_server), open_slots() as slots:
        with pytest.raises(ConfigError, match="no-such-tag"):
            async with slots.held("no-such-tag", uuid4()):
                pass
