"""Task groups whose failure is one error of the project's tree, not a group of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskGroup

from mover.errors import MoverError, gravity

__all__ = ["open_task_group"]


@asynccontextmanager
async def open_task_group() -> AsyncIterator[TaskGroup]:
    """An anyio task group that raises the gravest ``MoverError`` of its tasks bare; anything else stays a group.

    Of equals the first counts. The first failure cancels the siblings; what they raise besides is kept as notes.
    """
    try:
        async with anyio.create_task_group() as tasks:
            yield tasks
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


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for exc in group.exceptions:
        if isinstance(exc, BaseExceptionGroup):
            yield from _leaves(exc)
        else:
            yield exc
