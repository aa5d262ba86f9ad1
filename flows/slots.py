"""Slots of Prefect's limits that are really held: the lease of a running stage is kept alive, or the stage stops.

Prefect takes the slot of a tagged task with a lease of 60 s and renews it, but gives up after three tries within
seconds and lets the task go on: a server that restarts would lend the same slot to the next one. Here the renewal goes
on for as long as the lease lasts, and a stage whose lease is lost is cancelled; what it made durable is not lost.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final
from uuid import UUID

import anyio
import httpx
from prefect.client.orchestration import get_client

from mover.errors import MoverError
from mover.tasks import open_task_group

__all__ = ["LEASE_S", "SlotLostError", "SlotUnavailableError", "kept_alive", "renew_lease"]

LEASE_S: Final = 60.0
"""Length of the lease that Prefect's task engine takes; it is fixed there."""

_RENEW_EVERY_S: Final = 15.0
_RETRY_EVERY_S: Final = 2.0
_MARGIN_S: Final = 10.0  # the stage has stopped before the server may lend the slot again


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


async def renew_lease(lease_id: UUID) -> None:
    """Makes the lease last for ``LEASE_S`` from now.  Raises httpx.HTTPError."""
    async with get_client() as client:
        await client.renew_concurrency_lease(lease_id, lease_duration=LEASE_S)


@asynccontextmanager
async def kept_alive(
    lease_id: UUID,
    *,
    renew: Callable[[UUID], Awaitable[None]] = renew_lease,
    sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    clock: Callable[[], float] = anyio.current_time,
) -> AsyncIterator[None]:
    """Keeps the lease while the block runs.

    Raises:
        SlotLostError: it could not be kept; the block was cancelled before the slot may go to somebody else.
    """

    async def keep() -> None:
        kept_until = clock() + LEASE_S - _MARGIN_S
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
