"""The stages of datablocks as Prefect tasks: seen, counted and limited across all containers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from prefect import Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.context import TaskRunContext

from flows.limits import LIMIT_TAGS
from flows.slots import Slots
from mover.errors import MoverError, NotEnoughSpaceError
from mover.model import Stage
from mover.policies.retry import RetryPolicy, retrying

__all__ = ["TAGS", "StageTasks"]

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
    name = _NAMES[stage]

    @task(name=name, task_run_name=name + " {target}", cache_policy=NO_CACHE, persist_result=False)
    async def run(target: str, work: Callable[[], Awaitable[Any]]) -> Any:  # noqa: ANN401, ARG001 - names the run
        return await work()

    return run


_TASKS: Final[dict[Stage, Task[..., Any]]] = {stage: _stage_task(stage) for stage in _NAMES}


class StageTasks:
    """Runs every stage as a task run of its own, again while its error is retryable: a ``StageRunner``.

    A limited stage works only while it holds a slot of its limit: see ``flows.slots``.
    """

    def __init__(self, slots: Slots) -> None:
        self._slots = slots

    async def __call__(self, stage: Stage, name: str, work: Callable[[], Awaitable[T]]) -> T:
        """Awaits ``work``.

        Raises:
            ConfigError: the stage's limit does not exist on the server.
            MoverError: what ``work`` raises.
        """

        async def limited() -> T:
            return await self._holding(stage, work)

        async def once() -> T:
            result: T = await _TASKS[stage](name, limited if stage in TAGS else work)
            return result

        def tell(error: MoverError, failures: int, pause_s: float) -> None:
            get_run_logger().warning("%s %s: %s (failure %d, again in %.0f s)", stage, name, error, failures, pause_s)

        return await retrying(once, _STAGE_RETRIES, on_retry=tell, final=(NotEnoughSpaceError,))

    async def _holding(self, stage: Stage, work: Callable[[], Awaitable[T]]) -> T:
        tag = TAGS[stage]
        run = _task_run()
        async with self._slots.held(tag, run.id):
            run.tags.append(tag)  # shown with its end; a tag from the beginning would make Prefect take another slot
            return await work()


def _task_run() -> TaskRun:
    """The task run that is running."""
    context = TaskRunContext.get()
    assert context is not None  # noqa: S101 - called by tasks alone
    return context.task_run
