"""One dataset of a job through the engine, and what its end means: done, failed, or to be tried again, and when."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Protocol

import anyio
import anyio.to_thread
import msgspec

from mover.api import Failure
from mover.cli_errors import plain_error, record_of
from mover.daemon_book import Item
from mover.daemon_reports import PackedReport, Report, pack_report, plan_report
from mover.engine import Engine
from mover.errors import (
    DatasetBusyError,
    ExitCode,
    LtsError,
    MissingFilesError,
    MoverError,
    NotEnoughSpaceError,
    UsageError,
)
from mover.jobs_lifecycle import DatasetOutcome
from mover.policies.retry import RetryPolicy, delay_s
from mover.policies.space import SpaceReading

__all__ = [
    "EngineRunner",
    "NoCatalogueError",
    "Result",
    "Runner",
    "after_error",
    "after_result",
    "failure_of",
    "is_tried_again",
]


_SPACE_S: Final = 5.0
_SHORTEST_BUSY_S: Final = 2.0
_LONGEST_BUSY_S: Final = 30.0
_MOST_PATHS: Final = 10_000


class NoCatalogueError(UsageError):
    """An order counts on the registration of its datablocks, and the daemon knows no catalogue."""

    def __init__(self) -> None:
        super().__init__("the order asks for `registered`, and the daemon has no catalogue: SCICAT_ENDPOINT is not set")


class Result(msgspec.Struct, frozen=True):
    """What the engine made of a dataset. ``outcome``: as the catalogue was told; ``error``: it did not work."""

    report: PackedReport | None = None
    outcome: DatasetOutcome | None = None
    error: MoverError | None = None


class Runner(Protocol):
    """Runs datasets of jobs."""

    async def run(self, item: Item) -> Result:
        """One attempt.  Raises MoverError; cancelled, it leaves what the next attempt resumes."""
        ...


class EngineRunner:
    """Runs datasets in the engine; ``report_limit_bytes``: of one report's JSON."""

    def __init__(self, engine: Engine, report_limit_bytes: int) -> None:
        self._engine, self._limit_bytes = engine, report_limit_bytes

    async def run(self, item: Item) -> Result:
        """See Runner."""
        return Result(await self.pack(await self._call(item)))

    async def pack(self, report: Report) -> PackedReport:
        """The report as it is kept."""
        return await anyio.to_thread.run_sync(pack_report, report, self._limit_bytes)

    async def _call(self, item: Item) -> Report:
        engine, dataset_id, options = self._engine, item.dataset_id, item.job.row.options
        match item.job.row.kind:
            case "archive":
                if options.registered and not engine.has_catalogue:  # it had one when the order came
                    raise NoCatalogueError
                return await engine.archive(dataset_id, release_source=options.release_source)
            case "retrieve":
                return await engine.retrieve(dataset_id, files=options.files, form=options.form)
            case "verify":
                return await engine.verify(dataset_id, level=options.level)
            case "plan":
                plan, space = await engine.plan(dataset_id), await self._space()
                return plan_report(plan, space, engine.floor_percentage)

    async def _space(self) -> SpaceReading | None:
        """None when the share does not tell soon: a plan needs nothing else of it."""
        with anyio.move_on_after(_SPACE_S), suppress(LtsError):
            return await self._engine.space()
        return None


def after_result(result: Result) -> dict[str, Any]:
    """What becomes of a dataset whose run came to a result, as fields of its row."""
    if result.outcome is None or result.outcome.state == "done":
        return {"state": "done", "reason": "", "retry_ms": 0, "failures": 0}
    failure = failure_of(result.error) if result.error is not None else _told(result.outcome)
    return {"state": "failed", "reason": failure.message, "failure": failure, "retry_ms": 0}


def _told(outcome: DatasetOutcome) -> Failure:
    if outcome.state == "user-error":
        return Failure("UserError", outcome.message, ExitCode.USER, retryable=False, fault="user")
    return Failure("CatalogueAccessError", outcome.message, ExitCode.SYSTEM, retryable=False, fault="system")


def after_error(
    item: Item, error: Exception, now_ms: int, policy: RetryPolicy, busy_patience_s: float, rng: Callable[[], float]
) -> dict[str, Any]:
    """What becomes of a dataset after an attempt that failed, as fields of its row: to be tried again, or failed."""
    leaf = plain_error(error)
    failure = failure_of(leaf)
    if isinstance(leaf, DatasetBusyError):
        item.busy_since_ms = item.busy_since_ms or now_ms
        held_s = (now_ms - item.busy_since_ms) / 1000
        if held_s < busy_patience_s:
            pause_s = min(max(held_s / 4, _SHORTEST_BUSY_S), _LONGEST_BUSY_S)
            return _waiting(f"in use by {leaf.holder}", now_ms, pause_s, item.row.failures)
        return {"state": "failed", "reason": failure.message, "failure": failure, "retry_ms": 0}
    item.busy_since_ms = 0
    failures = _failures_in_a_row(item)
    retry_s = _retry_s(policy, failures, leaf, rng)
    if retry_s is not None:
        return _waiting(failure.message, now_ms, retry_s, failures)
    return {"state": "failed", "reason": failure.message, "failure": failure, "failures": failures, "retry_ms": 0}


def is_tried_again(item: Item, error: MoverError, policy: RetryPolicy) -> bool:
    """What ``after_error`` decides about a failure that is no run elsewhere."""
    return _retry_s(policy, _failures_in_a_row(item), error, lambda: 0.0) is not None


def _retry_s(policy: RetryPolicy, failures: int, error: BaseException, rng: Callable[[], float]) -> float | None:
    """Seconds to the next try, None: there is none. The wait for space has been as long as it may be."""
    return None if isinstance(error, NotEnoughSpaceError) else delay_s(policy, failures, error, rng)


def _failures_in_a_row(item: Item) -> int:
    """This one included."""
    return 1 if item.live is not None and item.live.advanced else item.row.failures + 1


def _waiting(reason: str, now_ms: int, pause_s: float, failures: int) -> dict[str, Any]:
    retry_ms = now_ms + max(round(pause_s * 1000), 1)
    return {"state": "waiting", "reason": reason, "retry_ms": retry_ms, "failures": failures}


def failure_of(error: BaseException) -> Failure:
    """The failure as it is kept and told; links and their signatures are taken out."""
    failure = msgspec.convert(record_of(error), Failure, from_attributes=True)
    leaf = plain_error(error)
    if not isinstance(leaf, MissingFilesError):
        return failure
    missing, wrong_size = leaf.missing[:_MOST_PATHS], leaf.wrong_size[:_MOST_PATHS]
    return msgspec.structs.replace(failure, missing=missing, wrong_size=wrong_size)
