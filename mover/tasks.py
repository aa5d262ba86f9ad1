"""Task groups whose failure is one error of the tree, not a group of them; long loops that let other tasks go on."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Final, TypeVar

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from mover.errors import MoverError, gravity

__all__ = ["TURN", "in_turns", "let_finish", "open_task_group", "side_by_side"]

T = TypeVar("T")

TURN: Final = 250
"""Items of a long loop that are dealt with before other tasks have their turn: about a millisecond's worth."""

_BY_SCOPE: Final = "Cancelled via cancel scope "  # anyio's mark, by which it knows its own


async def in_turns(items: Iterable[T]) -> AsyncIterator[T]:
    """The items; other tasks have their turn between every few hundred of them, and not before the first."""
    for index, item in enumerate(items):
        if index and not index % TURN:
            await anyio.lowlevel.checkpoint()
        yield item


@asynccontextmanager
async def open_task_group() -> AsyncIterator[TaskGroup]:
    """An anyio task group that raises the gravest ``MoverError`` of its tasks bare; anything else stays a group.

    Of equals the first counts. The first failure cancels the siblings; what they raise besides is kept as notes.

    A process that is told to end cancels all tasks of its loop. anyio's group takes that of a child for one of its own,
    passes it on to a host that is still cleaning up and, when a library underneath has taken the host's request for
    dealt with, goes on as if nothing had been. Here the host stays cancelled.
    """
    native: asyncio.CancelledError | None = None
    try:
        async with anyio.create_task_group() as tasks:
            try:
                yield tasks
            except asyncio.CancelledError as exc:
                native = _native(exc)
                raise
        # a cancelled scope further out delivers its cancellation by itself
        if native is not None and anyio.current_effective_deadline() > -math.inf:
            raise native
    except BaseExceptionGroup as group:
        leaves = list(_leaves(group))
        errors = [leaf for leaf in leaves if isinstance(leaf, MoverError)]
        if len(errors) < len(leaves):
            raise
        gravest = max(errors, key=lambda error: gravity(error.exit_code))
        for other in errors:
            if other is not gravest:
                gravest.add_note(f"besides: {other}")
        raise gravest from gravest.__cause__


def _native(exc: BaseException | None) -> asyncio.CancelledError | None:
    """The cancellation that asyncio itself asked for, if that is what anyio's own one came on top of."""
    while isinstance(exc, asyncio.CancelledError):
        if not str(exc.args[0] if exc.args else "").startswith(_BY_SCOPE):
            return exc
        exc = exc.__context__
    return None


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for exc in group.exceptions:
        if isinstance(exc, BaseExceptionGroup):
            yield from _leaves(exc)
        else:
            yield exc


async def side_by_side(
    items: Iterable[T],
    call: Callable[[T], Awaitable[None]],
    width: Callable[[], int],
    changed: Callable[[], anyio.Event] = anyio.Event,
) -> None:
    """Awaits ``call`` for every item, some at a time, begun in their order.

    ``width``: how many at a time; ``changed`` gives what is set when that may be another number. More are begun at once
    then; that they become fewer is the business of ``call``, which waits for a slot.
    """
    pending = iter(items)
    workers = 0
    watch = anyio.CancelScope()

    async def work() -> None:
        nonlocal workers
        try:
            for item in pending:  # shared: each worker takes the next one
                await call(item)
        finally:
            workers -= 1
            if not workers:
                watch.cancel()

    async with open_task_group() as tasks:
        with watch:
            while True:
                event = changed()
                for _ in range(workers, width()):
                    workers += 1
                    tasks.start_soon(work)
                await event.wait()


async def let_finish(operation: Callable[[], Awaitable[None]], grace_s: float) -> None:
    """Awaits ``operation``, which is cut off only ``grace_s`` seconds after a cancellation came.

    It keeps its own result: a cancellation that meets its end is raised here, and a value returned would be lost.
    """

    async def watch(scope: anyio.CancelScope) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            scope.deadline = anyio.current_time() + grace_s

    async with open_task_group() as tasks:
        with anyio.CancelScope(shield=True) as scope:
            tasks.start_soon(watch, scope)
            await operation()
        tasks.cancel_scope.cancel()
