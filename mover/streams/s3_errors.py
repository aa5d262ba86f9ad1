"""Failures of S3 calls, translated once from botocore's and aiohttp's exceptions into the project's error tree."""

from __future__ import annotations

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Final

import aiohttp
from botocore.exceptions import BotoCoreError, ClientError, ConnectTimeoutError, ReadTimeoutError
from botocore.parsers import ResponseParserError

from mover.errors import (
    MoverError,
    ObjectAccessError,
    ObjectChangedError,
    ObjectMissingError,
    ObjectThrottledError,
    ObjectTransientError,
    StallError,
    UploadMissingError,
)

__all__ = ["FOREIGN_ERRORS", "error_from_reply", "reply_code", "reply_status", "translate"]

FOREIGN_ERRORS: Final = (BotoCoreError, ClientError, aiohttp.ClientError, OSError)
"""What a call through aiobotocore can raise; TimeoutError is an OSError."""

_THROTTLE_CODES: Final = frozenset({
    "SlowDown", "SlowDownRead", "SlowDownWrite", "Throttling", "ThrottlingException", "ThrottledException",
    "BandwidthLimitExceeded",     "RequestLimitExceeded", "RequestThrottled", "RequestThrottledException",
    "TooManyRequests", "TooManyRequestsException",
})  # fmt: skip
_TRANSIENT_CODES: Final = frozenset({
    "BadDigest", "ConditionalRequestConflict", "IncompleteBody", "InternalError", "InternalServerError",
    "OperationAborted",
    "RequestTimeout", "RequestTimeoutException", "ServiceUnavailable", "XAmzContentSHA256Mismatch",
})  # fmt: skip
_HINTS: Final = {
    "RequestTimeTooSkewed": "compare this host's clock with the server's",
    "InvalidAccessKeyId": "check the access key: MINIO_USER",
    "SignatureDoesNotMatch": "check the secret key and the region: MINIO_PASSWORD, MINIO_REGION",
    "PermanentRedirect": "check the region and the endpoint: MINIO_REGION, MINIO_ENDPOINT",
    "NoSuchBucket": "check the bucket's name: MINIO_LANDINGZONE_BUCKET, MINIO_STAGING_BUCKET, MINIO_RETRIEVAL_BUCKET",
}
_REASON_CHARS: Final = 200
_QUERY: Final = re.compile(r"\?\S+")
_USER_INFO: Final = re.compile(r"//[^/@\s]+@")


def translate(op: str, location: str, exc: BaseException, *, stall_timeout_s: float = 0.0) -> MoverError:
    """The project's error for what a call raised. The caller raises it ``from exc``.

    Args:
        op: what was tried, e.g. ``put``.
        location: ``s3://bucket/key``.
        exc: what was raised.
        stall_timeout_s: named in the message when the stall watchdog fired.
    """
    if isinstance(exc, ClientError):
        reply = exc.response
        status = int(reply.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        headers = reply.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        error = reply.get("Error", {})
        return error_from_reply(
            op, location, status, str(error.get("Code", "")), str(error.get("Message") or ""), headers
        )
    if isinstance(exc, ConnectTimeoutError):
        return ObjectTransientError(op, location, "connecting took too long")
    if isinstance(exc, (ReadTimeoutError, TimeoutError)):
        return StallError(op, location, stall_timeout_s)
    reason = _reason(exc)
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        return ObjectAccessError(op, location, reason)
    if isinstance(exc, (aiohttp.ClientError, OSError, ResponseParserError)) or "error" in getattr(exc, "kwargs", {}):
        return ObjectTransientError(op, location, reason)  # botocore's connection errors carry the cause as "error"
    return ObjectAccessError(op, location, reason)


def error_from_reply(
    op: str, location: str, status: int, code: str, message: str, headers: Mapping[str, str]
) -> MoverError:
    """The error for an S3 error reply. ``headers`` has lower-case names; HEAD replies have the status as ``code``."""
    reason = _described(status, code, message)
    if code in _THROTTLE_CODES or code.startswith("Throttl") or status == 429:
        return ObjectThrottledError(op, location, reason, _retry_after_s(headers))
    if status == 503 and (code in {"503", "ServiceUnavailable", ""} or "retry-after" in headers):
        return ObjectThrottledError(op, location, reason, _retry_after_s(headers))
    if code in {"NoSuchKey", "404", "NotFound"}:
        return ObjectMissingError(op, location)
    if code == "NoSuchUpload":
        return UploadMissingError(op, location)
    if status == 412 or code == "PreconditionFailed":
        return ObjectChangedError(op, location, "precondition", "true", "false")
    if code in _TRANSIENT_CODES or (status >= 500 and status != 501 and code != "NotImplemented") or status == 408:
        return ObjectTransientError(op, location, reason)
    return ObjectAccessError(op, location, reason)


def reply_code(error: BaseException) -> str:
    """S3's error code behind a translated error, '' when there was no reply."""
    cause = error.__cause__
    return str(cause.response.get("Error", {}).get("Code", "")) if isinstance(cause, ClientError) else ""


def reply_status(error: BaseException) -> int:
    """The HTTP status behind a translated error, 0 when there was no reply."""
    cause = error.__cause__
    return (
        int(cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if isinstance(cause, ClientError)
        else 0
    )


def _described(status: int, code: str, message: str) -> str:
    text = f"{status} {code}" if code and code != str(status) else f"{status}"
    if message:
        text += f": {_masked(message)}"
    hint = _HINTS.get(code)
    return f"{text} ({hint})" if hint else text


def _reason(exc: BaseException) -> str:
    cause = getattr(exc, "kwargs", {}).get("error") or exc
    return _masked(f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__)


def _masked(text: str) -> str:
    """Without queries of URLs (signatures) and names in front of hosts, and of bounded length."""
    return _USER_INFO.sub("//", _QUERY.sub("", text))[:_REASON_CHARS]


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Retry-After in seconds; a date is taken relative to the reply's own Date, so that clocks need not agree."""
    value = headers.get("retry-after", "")
    try:
        return float(value)
    except ValueError:
        pass
    try:
        wait = parsedate_to_datetime(value) - parsedate_to_datetime(headers.get("date", ""))
    except (TypeError, ValueError):
        return None
    return max(wait.total_seconds(), 0.0)
