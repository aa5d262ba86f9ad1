"""Failures of requests as problem documents (RFC 9457), each with the request's id."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any, Final

import msgspec
from litestar import Request, Response
from litestar.enums import ParamType
from litestar.exceptions import HTTPException, InternalServerException
from litestar.params import ParameterKwarg
from litestar.types import ExceptionHandlersMap

from mover.api import Problem
from mover.daemon_http_bodies import BodyError, FieldError, allowed_text, field_error
from mover.daemon_runner import NoCatalogueError
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
_BOUNDS: Final = ("ge", "le", "min_length", "max_length", "pattern")
_BACK_S: Final = 10  # until a daemon that stops is probably back

_STATUS: Final[tuple[tuple[type[MoverError], HTTPStatus], ...]] = (
    (UnknownJobError, HTTPStatus.NOT_FOUND),
    (JobNotFoundError, HTTPStatus.NOT_FOUND),
    (KeyConflictError, HTTPStatus.CONFLICT),
    (JobMismatchError, HTTPStatus.CONFLICT),
    (JobFinishedError, HTTPStatus.CONFLICT),
    (NoCatalogueError, HTTPStatus.CONFLICT),
    (ConfigError, HTTPStatus.BAD_REQUEST),
    (QueueFullError, HTTPStatus.TOO_MANY_REQUESTS),
    (IntakeClosedError, HTTPStatus.SERVICE_UNAVAILABLE),
    (JournalError, HTTPStatus.SERVICE_UNAVAILABLE),
)
_log = logging.getLogger(__name__)


def request_id_of(scope: Mapping[str, Any]) -> str:
    """The request's id, which the front door has put there."""
    return str(scope.get("state", {}).get("request_id", ""))


def problem_of(
    error: Exception, parameter: Callable[[str, str], FieldError] | None = None
) -> tuple[Problem, dict[str, str]]:
    """The document for an error, and headers that go with it. What nobody expected tells nothing of itself.

    ``parameter`` tells of a parameter that was refused, from its name in the code and the reason.
    """
    if isinstance(error, BodyError):
        return Problem("Bad Request", 400, error.detail, errors=error.errors), {}
    if isinstance(error, HTTPException):
        return _of_http(error, parameter or _unnamed)
    if isinstance(error, MoverError):
        status = next((status for kind, status in _STATUS if isinstance(error, kind)), HTTPStatus.SERVICE_UNAVAILABLE)
        kind = _REASON + type(error).__name__
        return Problem(status.phrase, status, str(error), kind), _retry_after(error, status)
    return Problem("Internal Server Error", 500, "a defect of the daemon; its log has more under the request's id"), {}


def _of_http(error: HTTPException, parameter: Callable[[str, str], FieldError]) -> tuple[Problem, dict[str, str]]:
    status = HTTPStatus(error.status_code)
    errors: tuple[FieldError, ...] = ()
    if isinstance(error.extra, list):
        errors = tuple(
            parameter(str(item.get("key", "")), str(item.get("message", "")))
            for item in error.extra
            if isinstance(item, dict)
        )
    detail = error.detail if status < HTTPStatus.INTERNAL_SERVER_ERROR else ""
    if errors:
        detail = "; ".join(f"{item['field']} is {item['value']}: allowed is {item['allowed']}" for item in errors)
    return Problem(status.phrase, status, detail, errors=errors), dict(error.headers or {})


def _unnamed(name: str, reason: str) -> FieldError:
    return field_error(name, None, reason)


def _parameter(request: Request[Any, Any, Any], name: str, reason: str) -> FieldError:
    """As whoever calls knows the parameter: its public name, the value that was given, what is allowed."""
    definition = request.scope["route_handler"].parsed_fn_signature.parameters.get(name)
    kwarg = definition.kwarg_definition if definition is not None else None
    if definition is None or not isinstance(kwarg, ParameterKwarg):
        return _unnamed(name, reason)
    public = kwarg.name or name
    values = request.headers if kwarg.param_type is ParamType.HEADER else request.query_params
    bounds = {bound: getattr(kwarg, bound) for bound in _BOUNDS}
    meta = msgspec.Meta(**{bound: value for bound, value in bounds.items() if value is not None})
    allowed = allowed_text(msgspec.json.schema(Annotated[definition.annotation, meta]))
    return field_error(public, values.get(public), allowed or reason)


def _retry_after(error: MoverError, status: HTTPStatus) -> dict[str, str]:
    if isinstance(error, QueueFullError):
        return {"Retry-After": str(max(round(error.retry_after_s), 1))}
    return {"Retry-After": str(_BACK_S)} if status is HTTPStatus.SERVICE_UNAVAILABLE else {}


def problem_bytes(problem: Problem, scope: Mapping[str, Any]) -> bytes:
    """The encoded document, with the request's path and id."""
    told = msgspec.structs.replace(problem, instance=str(scope.get("path", "")), request_id=request_id_of(scope))
    return msgspec.json.encode(told)


def _answer(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    problem, headers = problem_of(error, partial(_parameter, request))
    if isinstance(error, InternalServerException) and _GONE in error.detail:
        _log.info("request %s: the client went away before its end", request_id_of(request.scope))
    elif problem.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        defect = problem.status == HTTPStatus.INTERNAL_SERVER_ERROR  # else it is starting, stopping, or full
        level, trace = (logging.ERROR, error) if defect else (logging.WARNING, None)
        _log.log(level, "request %s: %s", request_id_of(request.scope), type(error).__name__, exc_info=trace)
    return Response(
        problem_bytes(problem, request.scope),
        status_code=problem.status,
        headers=headers,
        media_type=PROBLEM_TYPE,
    )


EXCEPTION_HANDLERS: Final[ExceptionHandlersMap] = {Exception: _answer}
"""For the application: every exception becomes a problem document."""
