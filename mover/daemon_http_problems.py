"""Failures of requests as problem documents (RFC 9457), each with the request's id."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException, InternalServerException
from litestar.types import ExceptionHandlersMap

from mover.api import Problem
from mover.daemon_http_bodies import BodyError, FieldError, field_error
from mover.errors import (
    ConfigError,
    IntakeClosedError,
    JobFinishedError,
    JobMismatchError,
    JobNotFoundError,
    JournalError,
    KeyConflictError,
    MoverError,
    QueueFullError,
    UnknownJobError,
)

__all__ = ["EXCEPTION_HANDLERS", "PROBLEM_TYPE", "problem_bytes", "problem_of", "request_id_of"]

PROBLEM_TYPE: Final = "application/problem+json"
_REASON: Final = "urn:mover:error:"  # followed by the error's name, for programs
_GONE: Final = "client disconnected"  # litestar's words for a body that breaks off
_BACK_S: Final = 10  # until a daemon that stops is probably back

_STATUS: Final[tuple[tuple[type[MoverError], HTTPStatus], ...]] = (
    (UnknownJobError, HTTPStatus.NOT_FOUND),
    (JobNotFoundError, HTTPStatus.NOT_FOUND),
    (KeyConflictError, HTTPStatus.CONFLICT),
    (JobMismatchError, HTTPStatus.CONFLICT),
    (JobFinishedError, HTTPStatus.CONFLICT),
    (ConfigError, HTTPStatus.BAD_REQUEST),
    (QueueFullError, HTTPStatus.TOO_MANY_REQUESTS),
    (IntakeClosedError, HTTPStatus.SERVICE_UNAVAILABLE),
    (JournalError, HTTPStatus.SERVICE_UNAVAILABLE),
)
_log = logging.getLogger(__name__)


def request_id_of(scope: Mapping[str, Any]) -> str:
    """The request's id, which the front door has put there."""
    return str(scope.get("state", {}).get("request_id", ""))


def problem_of(error: Exception, given: Mapping[str, str] | None = None) -> tuple[Problem, dict[str, str]]:
    """The document for an error, and headers that go with it. What nobody expected tells nothing of itself.

    ``given``: headers and parameters of the request, whose values are told where one is refused.
    """
    if isinstance(error, BodyError):
        return Problem("Bad Request", 400, error.detail, errors=error.errors), {}
    if isinstance(error, HTTPException):
        return _of_http(error, given or {})
    if isinstance(error, MoverError):
        status = next((status for kind, status in _STATUS if isinstance(error, kind)), HTTPStatus.SERVICE_UNAVAILABLE)
        kind = _REASON + type(error).__name__
        return Problem(status.phrase, status, str(error), kind), _retry_after(error, status)
    return Problem("Internal Server Error", 500, "a defect of the daemon; its log has more under the request's id"), {}


def _of_http(error: HTTPException, given: Mapping[str, str]) -> tuple[Problem, dict[str, str]]:
    status = HTTPStatus(error.status_code)
    errors: tuple[FieldError, ...] = ()
    if isinstance(error.extra, list):
        errors = tuple(
            field_error(str(item.get("key", "")), given.get(str(item.get("key", ""))), str(item.get("message", "")))
            for item in error.extra
            if isinstance(item, dict)
        )
    detail = error.detail if status < HTTPStatus.INTERNAL_SERVER_ERROR else ""
    if errors:
        detail = "; ".join(f"{item['field']} is {item['value']}: {item['allowed']}" for item in errors)
    return Problem(status.phrase, status, detail, errors=errors), dict(error.headers or {})


def _retry_after(error: MoverError, status: HTTPStatus) -> dict[str, str]:
    if isinstance(error, QueueFullError):
        return {"Retry-After": str(max(round(error.retry_after_s), 1))}
    return {"Retry-After": str(_BACK_S)} if status is HTTPStatus.SERVICE_UNAVAILABLE else {}


def problem_bytes(problem: Problem, scope: Mapping[str, Any]) -> bytes:
    """The encoded document, with the request's path and id."""
    told = msgspec.structs.replace(problem, instance=str(scope.get("path", "")), request_id=request_id_of(scope))
    return msgspec.json.encode(told)


def _answer(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    problem, headers = problem_of(error, {**request.headers, **dict(request.query_params.items())})
    if isinstance(error, InternalServerException) and _GONE in error.detail:
        _log.info("request %s: the client went away before its end", request_id_of(request.scope))
    elif problem.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        trace = error if problem.status == HTTPStatus.INTERNAL_SERVER_ERROR else None
        _log.error("request %s: %s", request_id_of(request.scope), type(error).__name__, exc_info=trace)
    return Response(
        problem_bytes(problem, request.scope),
        status_code=problem.status,
        headers=headers,
        media_type=PROBLEM_TYPE,
    )


EXCEPTION_HANDLERS: Final[ExceptionHandlersMap] = {Exception: _answer}
"""For the application: every exception becomes a problem document."""
