"""What the daemon tells of failures, as the errors that they are: of its answers, and of the datasets of a job."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from http import HTTPStatus
from typing import Final

import msgspec

from mover.api import DatasetView, Failure, Problem
from mover.errors import (
    DaemonAccessError,
    DaemonTransientError,
    DatasetNotFoundError,
    ExitCode,
    Fault,
    KeyConflictError,
    MissingFilesError,
    MoverError,
    OrderRefusedError,
    UnknownJobError,
)

__all__ = ["RemoteError", "failure_error", "refusal_of"]

_DENIED: Final = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})
_PASSING: Final = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})


class RemoteError(MoverError):
    """A dataset that failed in the daemon: what is told, whose fault it is and the exit code are as they were there."""

    def __init__(self, message: str) -> None:
        super().__init__(message)


def failure_error(dataset: DatasetView) -> MoverError:
    """Why a dataset of a job that has ended is not done."""
    failure = dataset.failure
    if failure is None:
        reason = dataset.reason or f"the job was {dataset.state}"
        failure = Failure("Cancelled", reason, ExitCode.INTERRUPTED, retryable=True, fault="user")
    if failure.kind == MissingFilesError.__name__:
        error = MissingFilesError(dataset.dataset_id, failure.missing, failure.wrong_size)
        error.args = (failure.message,)  # with the number of all of them
        return error
    if failure.kind == DatasetNotFoundError.__name__:
        absent = DatasetNotFoundError(dataset.dataset_id, "")
        absent.args = (failure.message,)  # with the place
        return absent
    known = failure.exit_code in set(ExitCode)
    code = ExitCode(failure.exit_code) if known else ExitCode.SYSTEM
    return _error_class(failure.kind, code, failure.retryable, failure.fault)(failure.message)


@cache
def _error_class(name: str, code: ExitCode, retryable: bool, fault: str) -> type[RemoteError]:  # noqa: FBT001 - a key of the cache
    """A class for each kind of failure, so that it is told under its own name."""
    said = {"retryable": retryable, "fault": Fault(fault), "exit_code": code, "__doc__": RemoteError.__doc__}
    return type(name, (RemoteError,), said)


def refusal_of(status: int, content: bytes, headers: Mapping[str, str], url: str, job_id: str = "") -> MoverError:
    """The error of an answer that is none of success. ``job_id``: what was asked for."""
    problem = _problem(content)
    request = f" (request {problem.request_id})" if problem.request_id else ""
    reason = (problem.detail or problem.title or f"status {status}") + request
    if status in _DENIED:
        return DaemonAccessError(url, reason)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _PASSING:
        return DaemonTransientError(url, reason, _seconds(headers.get("Retry-After")))
    name = problem.type.rpartition(":")[2]
    if name == UnknownJobError.__name__:
        return UnknownJobError(job_id)
    if name == KeyConflictError.__name__:
        return _error_class(name, KeyConflictError.exit_code, retryable=False, fault="user")(reason)
    if not problem.status:
        return DaemonAccessError(url, f"status {status}; is this the daemon?")
    wrong = "; ".join(f"{item.get('field')}: allowed is {item.get('allowed')}" for item in problem.errors)
    return OrderRefusedError(f"{reason}; {wrong}" if wrong and wrong not in reason else reason)


def _problem(content: bytes) -> Problem:
    try:
        return msgspec.json.decode(content, type=Problem)
    except msgspec.MsgspecError:  # a proxy's answer
        return Problem("", 0)


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else max(float(text), 0.0)
    except ValueError:  # a date, of a proxy
        return None
