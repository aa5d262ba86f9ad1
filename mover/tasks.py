"""Task groups whose failure is one error of the project's tree, not a group of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskGroup

from mover.errors import MoverError

__all__ = ["open_task_group"]


@asynccontextmanager
async def open_task_group() -> AsyncIterator[TaskGroup]:
    """An anyio task group that raises the first ``MoverError`` of its tasks bare; anything else stays a group.

    The first failure cancels the siblings, so what they raise besides is its consequence: it is kept as notes.
    """
    try:
        async with anyio.create_task_group() as tasks:
            yield tasks
    except BaseExceptionGroup as group:
        leaves = list(_leaves(group))
        errors = [leaf for leaf in leaves if isinstance(leaf, MoverError)]
        if len(errors) < len(leaves):
            raise
        first, *others = errors
        for other in others:
            first.add_note(f"besides: {other}")
        raise first from first.__cause__


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for exc in group.exceptions:
        if isinstance(exc, BaseExceptionGroup):
            yield from _leaves(exc)
        else:
            yield exc
