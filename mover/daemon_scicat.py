"""Jobs of SciCat: its trigger, and a look now and then at what the trigger missed.

SciCat tells of a job once, waits for the answer, and shows a refusal to the person who ordered. So what comes in is
taken at once; it is started behind that, and what cannot be started stays in the catalogue, where it is found again.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, Literal, Protocol

import anyio
import msgspec
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from litestar import Request, Response, post
from litestar.di import NamedDependency
from litestar.params import SkipValidation

from mover.daemon_http_bodies import BodyError, field_error
from mover.daemon_prefect import check_job_id
from mover.errors import JobFinishedError, JobMismatchError, JobNotFoundError, MoverError, QueueFullError
from mover.jobs_lifecycle import SUBMITTED, JobKind
from mover.policies.retry import RetryPolicy, retrying
from mover.tasks import open_task_group

__all__ = ["TRIGGER_ROUTE", "CatalogueTrigger", "Starter", "TriggerReply", "UnexpectedStartError"]

_log = logging.getLogger(__name__)

_ANSWER_S: Final = 0.8  # the person who orders waits for it
_WAITING_TRIGGERS: Final = 1_000
_WHAT: Final = "jobs to be started"
_STARTED_AT_A_TIME: Final = 4
_PATIENCE: Final = RetryPolicy(attempts=8, base_s=1.0, cap_s=60.0)
_FULL_RETRY_S: Final = 30.0
_KINDS: Final[dict[str, JobKind]] = {"archive": "archive", "retrieve": "retrieve"}
_REFUSALS: Final = (JobFinishedError, JobMismatchError, JobNotFoundError)


class TriggerReply(msgspec.Struct, frozen=True):
    """What became of a trigger. ``run``: the job of the daemon or the run of Prefect that does it, once it is known."""

    id: str
    action: Literal["started", "taken", "ignored"]
    reason: str = ""
    run: str = ""


class Starter(Protocol):
    """Sees to it that somebody works on a job."""

    async def start(self, kind: JobKind, job_id: str) -> str:
        """Starts a job of the catalogue, once however often it is called; returns the name of what does it.

        Raises:
            JobNotFoundError, JobMismatchError, JobFinishedError: there is nothing to start.
            MoverError: it cannot be started now, or not before somebody has acted.
        """
        ...


class UnexpectedStartError(MoverError):
    """A defect, met while a job was started."""


class _Order(msgspec.Struct):
    """What is read of a job in the form of either version, or of the two fields that every site has to send.

    A template writes null for a field that the job lacks: that is as if it were not there.
    """

    type: str | None = None
    id: str | None = None
    old_id: str | None = msgspec.field(default=None, name="_id")
    status: str | None = msgspec.field(default=None, name="statusCode")
    old_status: str | None = msgspec.field(default=None, name="jobStatusMessage")


class _Task:
    """A job on its way to be started; ``done`` once it is known how that went."""

    def __init__(self, kind: JobKind, job_id: str) -> None:
        self.kind, self.job_id = kind, job_id
        self.done = anyio.Event()
        self.run = ""
        self.error: MoverError | None = None


class CatalogueTrigger:
    """Takes what SciCat tells, and has it started. Open it with :meth:`open`."""

    def __init__(self, starter: Starter, tasks: MemoryObjectSendStream[_Task], retry: RetryPolicy) -> None:
        self._starter, self._tasks, self._retry = starter, tasks, retry
        self._under_way: dict[tuple[JobKind, str], _Task] = {}

    @classmethod
    @asynccontextmanager
    async def open(cls, starter: Starter, *, retry: RetryPolicy = _PATIENCE) -> AsyncIterator[CatalogueTrigger]:
        """A trigger whose jobs are started while the block runs. ``retry``: for a start that fails for now."""
        send, receive = anyio.create_memory_object_stream[_Task](_WAITING_TRIGGERS)
        trigger = cls(starter, send, retry)
        async with send, receive, open_task_group() as group:
            for _ in range(_STARTED_AT_A_TIME):
                group.start_soon(trigger._work, receive)
            yield trigger
            group.cancel_scope.cancel()

    async def take(self, kind: JobKind, job_id: str) -> TriggerReply:
        """Takes a job, and waits shortly for how its start goes.

        Raises:
            QueueFullError: too many wait to be started.
            JobNotFoundError, JobMismatchError: the catalogue knows no such job.
        """
        task = self._under_way.get((kind, job_id))
        if task is None:
            task = _Task(kind, job_id)
            try:
                self._tasks.send_nowait(task)
            except anyio.WouldBlock as error:
                raise QueueFullError(_WHAT, _WAITING_TRIGGERS, _FULL_RETRY_S) from error
            self._under_way[kind, job_id] = task
        with anyio.move_on_after(_ANSWER_S):
            await task.done.wait()
        if task.error is None:
            return TriggerReply(job_id, "started" if task.run else "taken", run=task.run)
        if isinstance(task.error, JobFinishedError):
            return TriggerReply(job_id, "ignored", str(task.error))
        if isinstance(task.error, _REFUSALS):
            raise task.error
        return TriggerReply(job_id, "taken", "it cannot be started now, and is looked at again later")

    async def _work(self, tasks: MemoryObjectReceiveStream[_Task]) -> None:
        async for task in tasks:
            try:
                task.run = await retrying(partial(self._starter.start, task.kind, task.job_id), self._retry)
                _log.info("%s job %s: started as %s", task.kind, task.job_id, task.run)
            except MoverError as error:
                task.error = error
                _log.warning("%s job %s is not started: %s", task.kind, task.job_id, error)
            except Exception as error:  # noqa: BLE001 - one job that nobody understands ends no daemon
                task.error = UnexpectedStartError(type(error).__name__)
                _log.exception("%s job %s is not started", task.kind, task.job_id)
            finally:
                self._under_way.pop((task.kind, task.job_id), None)
                task.done.set()


@post(
    "/v1/scicat/jobs",
    operation_id="triggerScicatJob",
    tags=["catalogue"],
    summary="Take a job that SciCat tells of",
    description=(
        "For an action of type `url` in SciCat's job configuration. The body is JSON, whatever type it is declared as;"
        " fields besides these are ignored. Basic authentication has a token's name as user and the token as password."
    ),
    status_code=202,
)
async def _take(
    request: Request[Any, Any, Any], scicat: NamedDependency[SkipValidation[CatalogueTrigger]]
) -> Response[bytes]:
    job_id, kind_name, status = _read(await request.body())
    check_job_id(job_id)
    kind = _KINDS.get(kind_name)
    if kind is None:
        reply = TriggerReply(job_id, "ignored", f"jobs of type {kind_name[:200]!r} are none of the mover's")
    elif status not in {"", SUBMITTED}:
        reply = TriggerReply(job_id, "ignored", f"the job is {status[:200]!r}, and was told of before")
    else:
        reply = await scicat.take(kind, job_id)
    code = 200 if reply.action == "ignored" else 202
    return Response(msgspec.json.encode(reply), status_code=code, media_type="application/json")


TRIGGER_ROUTE: Final = _take
"""The route; it needs the dependency ``scicat``."""


def _read(body: bytes) -> tuple[str, str, str]:
    """Id, type and status ('': not told).  Raises BodyError."""
    try:
        document = msgspec.json.decode(body)
        if isinstance(document, str):  # a template that quotes the job once too often
            document = msgspec.json.decode(document)
        order = msgspec.convert(document, _Order)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        detail = "the body is no job of SciCat: a JSON object with at least `id` and `type`"
        raise BodyError(detail, (field_error("", None, str(error)),)) from error
    kind_name, job_id = order.type or "", order.id or order.old_id or ""
    for name, value in (("type", kind_name), ("id", job_id)):
        if not value:
            detail = f"{name} is missing"
            raise BodyError(detail, ({"field": name, "value": "", "allowed": "a text that is not empty"},))
    return job_id, kind_name, order.status or order.old_status or ""
