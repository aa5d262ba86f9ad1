"""Stages of datablocks as units that a face can see: an orchestrator makes a task of each, counts and limits them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from mover.model import Stage

__all__ = ["StageRunner", "run_directly"]

T = TypeVar("T")


class StageRunner(Protocol):
    """Runs one stage of one datablock (or of a whole dataset) and returns what it came to.

    It is called with the engine's own slot held, so that a process never asks for more than its own limits allow. It
    may await ``work`` again when that failed with an error that is retryable: what was durable is not done again.
    """

    async def __call__(self, stage: Stage, name: str, work: Callable[[], Awaitable[T]]) -> T:
        """Awaits ``work``. ``name`` is the datablock's, or the dataset's id.  Raises what ``work`` raises."""
        ...


async def run_directly(stage: Stage, name: str, work: Callable[[], Awaitable[T]]) -> T:  # noqa: ARG001 - the protocol's
    """Stages are nothing but calls."""
    return await work()
