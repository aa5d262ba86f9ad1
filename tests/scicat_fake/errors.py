"""Answers that are errors, in the shapes that the backend uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from http import HTTPStatus

__all__ = ["ApiError", "forbidden", "http_error", "internal_error", "invalid", "job_error"]


class ApiError(Exception):
    """An error that is answered as JSON; ``body`` is an object, or a string for what the backend did not expect."""

    def __init__(self, status: int, body: object, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, body)
        self.status = status
        self.body = body
        self.headers = dict(headers or {})


def http_error(status: int, message: object) -> ApiError:
    return ApiError(status, {"message": message, "error": HTTPStatus(status).phrase, "statusCode": status})


def invalid(messages: Iterable[str]) -> ApiError:
    """The body breaks the rules for its fields: 400 with one message for each of them."""
    return http_error(400, list(messages))


def forbidden() -> ApiError:
    return http_error(403, "Unauthorized access")


def job_error(status: int, message: str, error: str | None = None) -> ApiError:
    """What the jobs' own checks answer: another shape than everywhere else."""
    body: dict[str, object] = {"status": status, "message": message}
    if error is not None:
        body["error"] = error
    return ApiError(status, body)


def internal_error() -> ApiError:
    """Whatever the backend has no answer for, an oversized body included: 500 and a bare JSON string."""
    return ApiError(500, "Internal server error")
