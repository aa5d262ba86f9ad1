"""The stages of datablocks as Prefect tasks: seen, counted and, by their tags, limited across all containers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar
from uuid import UUID

from prefect import Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.context import ConcurrencyContext

from flows.limits import LIMIT_TAGS, limit_name
from flows.slots import SlotUnavailableError, kept_alive
from mover.errors import ConfigError, MoverError
from mover.model import Stage
from mover.policies.retry import RetryPolicy, retrying

__all__ = ["TAGS", "run_stage"]

T = TypeVar("T")

TAGS: Final[dict[Stage, str]] = {
    Stage.SPACE: LIMIT_TAGS["LTS_FREE_LIMIT"],
    Stage.MOVE: LIMIT_TAGS["MOVE_TO_LTS_LIMIT"],
    Stage.VERIFY: LIMIT_TAGS["VERIFY_LTS_LIMIT"],
    Stage.RETRIEVE: LIMIT_TAGS["LTS_TO_RETRIEVAL_LIMIT"],
}
"""Tag of each stage that a documented limit guards."""

_NAMES: Final[dict[Stage, str]] = {
    Stage.SPACE: "wait-for-space",
    Stage.MOVE: "move",
    Stage.VERIFY: "verify",
    Stage.REGISTER: "register",
    Stage.RELEASE: "release",
    Stage.RETRIEVE: "retrieve",
}
# A stage is repeated with what was durable; the engine below has already been patient with single requests. The pauses
# are long enough for a Prefect server to come back.
_STAGE_RETRIES: Final = RetryPolicy(attempts=8, base_s=5.0, cap_s=60.0)


def _stage_task(stage: Stage) -> Task[..., Any]:
    name, tag = _NAMES[stage], TAGS.get(stage)

    @task(
        name=name,
        task_run_name=name + " {target}",
        tags=[tag] if tag else None,
        cache_policy=NO_CACHE,
        persist_result=False,
    )
    async def run(target: str, work: Callable[[], Awaitable[Any]]) -> Any:  # noqa: ANN401, ARG001 - names the run
        return await work()

    return run


_TASKS: Final[dict[Stage, Task[..., Any]]] = {stage: _stage_task(stage) for stage in _NAMES}


async def run_stage(stage: Stage, name: str, work: Callable[[], Awaitable[T]]) -> T:
    """Runs a stage as a task run of its own, again while its error is retryable.

    A limited stage runs only while its slot is held: see ``flows.slots``.

    Raises:
        ConfigError: the limit does not exist on the server.
        MoverError: what ``work`` raises.
    """
    tag = TAGS.get(stage)

    async def once() -> T:
        return await (_run(stage, name, work) if tag is None else _run_limited(stage, tag, name, work))

    def tell(error: MoverError, failures: int, pause_s: float) -> None:
        get_run_logger().warning("%s %s: %s (failure %d, again in %.0f s)", stage, name, error, failures, pause_s)

    return await retrying(once, _STAGE_RETRIES, on_retry=tell)


async def _run(stage: Stage, name: str, work: Callable[[], Awaitable[T]]) -> T:
    result: T = await _TASKS[stage](name, work)
    return result


async def _run_limited(stage: Stage, tag: str, name: str, work: Callable[[], Awaitable[T]]) -> T:
    async def hold_and_work() -> T:
        async with kept_alive(_lease(tag)):
            return await work()

    try:
        return await _run(stage, name, hold_and_work)
    except ConcurrencySlotAcquisitionError as error:
        raise SlotUnavailableError(tag, str(error)) from error


def _lease(tag: str) -> UUID:
    """The lease that Prefect took for the task run that is running.

    It is noted in the context that the task run began with; its function runs in one more, which replaced that one.

    Raises:
        ConfigError: there is none, because the limit does not exist: Prefect then runs the task without any.
    """
    context = ConcurrencyContext.get()
    began = context._token.old_value if context is not None and context._token is not None else None  # noqa: SLF001
    lease_ids: list[UUID] = getattr(began, "cleanup_lease_ids", [])
    if not lease_ids:
        limit = limit_name(tag)
        raise ConfigError(limit, None, "a limit on the Prefect server; `python -m flows.configure` creates it")
    return lease_ids[-1]
