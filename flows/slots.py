"""Slots of Prefect's limits that are really held: the lease of a running stage is kept alive, or the stage stops.

The limits are those of tags on the server (``tag:move-to-lts``), but no task begins with the tag: Prefect's own client
takes the slot of a tagged task, and

- renews its lease, but gives up after three tries within seconds and lets the task go on: a server that restarts would
  lend the same slot to the next one. Here the renewal goes on for as long as the lease lasts, and a stage whose lease
  is lost is cancelled; what it made durable is not lost.
- waits for 2 s and longer when the server is busy with another write, which on SQLite is the rule and not the exception
  as soon as stages run side by side. Here it is asked again within milliseconds, and a short stage hands its slot on to
  the next one of its process.
"""

from __future__ import annotations

import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final
from uuid import UUID

import anyio
import httpx
import msgspec
from anyio.abc import TaskGroup
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import ConcurrencyLeaseHolder
from prefect.client.schemas.responses import ConcurrencyLimitWithLeaseResponse
from prefect.settings import get_current_settings

from flows.limits import limit_name
from flows.progress import run_logger
from mover.errors import ConfigError, MoverError
from mover.tasks import open_task_group

__all__ = ["LEASE_S", "SlotLostError", "SlotUnavailableError", "Slots", "kept_alive", "open_slots", "renew_lease"]

LEASE_S: Final = 60.0
"""Length of a lease; the server takes no shorter one."""

_RENEW_EVERY_S: Final = 15.0
_RETRY_EVERY_S: Final = 2.0
_MARGIN_S: Final = 10.0  # the stage has stopped before the server may lend the slot again
_ASK_S: Final = 10.0  # for one request: a cancelled stage waits for its answer, so that no slot stays taken by nobody
_SPARE_S: Final = 0.1  # a slot waits so long for the next stage
_HAND_ON_S: Final = 10.0  # after that other processes have their chance
_BUSY_TRIES: Final = 40
_BUSY_PAUSE_S: Final = 0.05  # on average


class SlotLostError(MoverError):
    """The lease of a slot ran out while the stage was running: the server was away for too long."""

    retryable = True

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"the slot of the limit was lost ({reason}); the stage stops and waits for another one")


class SlotUnavailableError(MoverError):
    """No slot could be asked for: the Prefect server does not answer."""

    retryable = True

    def __init__(self, tag: str, reason: str) -> None:
        self.tag, self.reason = tag, reason
        super().__init__(f"no slot of the limit {tag!r} could be asked for: {reason}")


class _Lease(msgspec.Struct, eq=False):
    """A slot that was lent at ``asked_s`` (of the loop's clock)."""

    tag: str
    lease_id: UUID
    asked_s: float


class Slots:
    """Takes slots of the limits for the stages of this process, one request after the other. See ``open_slots``."""

    def __init__(self, client: PrefectClient, tasks: TaskGroup) -> None:
        self._client, self._tasks = client, tasks
        self._turn = anyio.Lock()  # two writes of one process at a time would only meet on the server
        self._spare: list[_Lease] = []

    @asynccontextmanager
    async def held(self, tag: str, holder_id: UUID) -> AsyncIterator[None]:
        """Waits for a slot of a tag's limit and keeps it while the block runs; ``holder_id``: the task run.

        Raises:
            ConfigError: the limit does not exist.
            SlotUnavailableError: the server does not answer, or lends no slot at all.
            SlotLostError: the slot could not be kept; the block was cancelled.
        """
        lease = self._handed_on(tag) or await self._take(tag, holder_id)
        done = False
        try:
            async with kept_alive(lease.lease_id, asked_s=lease.asked_s):
                yield
            done = anyio.current_time() - lease.asked_s < _HAND_ON_S
        finally:
            if done:
                self._spare.append(lease)
                self._tasks.start_soon(self._give_back_unused, lease)
            else:
                await self._give_back(lease)

    async def close(self) -> None:
        """Gives back what waits for a next stage."""
        while self._spare:
            await self._give_back(self._spare.pop())

    def _handed_on(self, tag: str) -> _Lease | None:
        for lease in self._spare:
            if lease.tag == tag:
                self._spare.remove(lease)
                return lease
        return None

    async def _give_back_unused(self, lease: _Lease) -> None:
        await anyio.sleep(_SPARE_S)
        if lease in self._spare:
            self._spare.remove(lease)
            await self._give_back(lease)

    async def _take(self, tag: str, holder_id: UUID) -> _Lease:
        told = False
        while True:
            try:
                return await self._ask(tag, holder_id)
            except httpx.HTTPStatusError as error:
                if error.response.status_code != httpx.codes.LOCKED:
                    raise SlotUnavailableError(tag, f"the server answers {error.response.status_code}") from error
                pause_s = float(error.response.headers.get("Retry-After", _RETRY_EVERY_S))
            except (httpx.HTTPError, TimeoutError) as error:
                raise SlotUnavailableError(tag, type(error).__name__) from error
            if not told:
                run_logger().info("waits for a slot of the limit %r, which other runs have", tag)
                told = True
            await anyio.sleep(pause_s)

    async def _ask(self, tag: str, holder_id: UUID) -> _Lease:
        holder = ConcurrencyLeaseHolder(type="task_run", id=holder_id)
        names = [limit_name(tag)]
        async with self._turn:
            asked_s = anyio.current_time()
            with anyio.fail_after(_ASK_S, shield=True):
                response = await self._client.increment_concurrency_slots_with_lease(
                    names, 1, "concurrency", LEASE_S, holder
                )
        lent = ConcurrencyLimitWithLeaseResponse.model_validate(response.json())
        if not lent.limits:
            raise ConfigError(names[0], None, "a limit on the Prefect server; `python -m flows.configure` creates it")
        return _Lease(tag, lent.lease_id, asked_s)

    async def _give_back(self, lease: _Lease) -> None:
        """A slot that cannot be given back comes back with the end of its lease."""
        with anyio.move_on_after(_ASK_S, shield=True), suppress(httpx.HTTPError):
            async with self._turn:
                await self._client.release_concurrency_slots_with_lease(lease.lease_id)


@asynccontextmanager
async def open_slots() -> AsyncIterator[Slots]:
    """Slots with a connection of their own to the server of Prefect's settings."""
    transport = _Impatient(verify=_trusted())
    async with get_client(httpx_settings={"transport": transport}) as client, open_task_group() as tasks:
        slots = Slots(client, tasks)
        try:
            yield slots
        finally:
            tasks.cancel_scope.cancel()
            await slots.close()


class _Impatient(httpx.AsyncHTTPTransport):
    """Asks a busy server again at once; Prefect's client, above it, has the patience for one that is away."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        for _ in range(_BUSY_TRIES):
            response = await super().handle_async_request(request)
            if response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                return response
            await response.aclose()
            await anyio.sleep(2 * _BUSY_PAUSE_S * random.random())
        return await super().handle_async_request(request)


def _trusted() -> ssl.SSLContext | bool:
    """What Prefect's settings say about certificates; a transport of one's own has to be told."""
    api = get_current_settings().api
    if api.tls_insecure_skip_verify:
        return False
    return ssl.create_default_context(cafile=api.ssl_cert_file) if api.ssl_cert_file else True


async def renew_lease(lease_id: UUID) -> None:
    """Makes the lease last for ``LEASE_S`` from now.  Raises httpx.HTTPError."""
    async with get_client() as client:
        await client.renew_concurrency_lease(lease_id, lease_duration=LEASE_S)


@asynccontextmanager
async def kept_alive(
    lease_id: UUID,
    *,
    asked_s: float | None = None,
    renew: Callable[[UUID], Awaitable[None]] = renew_lease,
    sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    clock: Callable[[], float] = anyio.current_time,
) -> AsyncIterator[None]:
    """Keeps the lease while the block runs; it was asked for at ``asked_s`` of the clock, now when not given.

    Raises:
        SlotLostError: it could not be kept; the block was cancelled before the slot may go to somebody else.
    """

    async def keep() -> None:
        kept_until = (clock() if asked_s is None else asked_s) + LEASE_S - _MARGIN_S
        while True:
            asked = clock()
            try:
                with anyio.move_on_after(max(kept_until - asked, 0)) as scope:
                    await renew(lease_id)
                reason = "the server does not answer" if scope.cancelled_caught else ""
            except httpx.HTTPStatusError as error:
                if error.response.status_code == httpx.codes.GONE:
                    reason = "it had run out already"
                    raise SlotLostError(reason) from error
                reason = f"the server answers {error.response.status_code}"
            except httpx.HTTPError as error:
                reason = type(error).__name__
            if not reason:
                kept_until = asked + LEASE_S - _MARGIN_S
            if clock() >= kept_until:
                raise SlotLostError(reason)
            await sleep(_RETRY_EVERY_S if reason else _RENEW_EVERY_S)

    async with open_task_group() as tasks:
        tasks.start_soon(keep)
        yield
        tasks.cancel_scope.cancel()
