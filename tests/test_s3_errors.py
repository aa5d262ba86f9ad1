"""Foreign failures of S3 calls arrive as the project's errors: right class, no secrets, useful hints."""

from __future__ import annotations

import aiohttp
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, ReadTimeoutError, SSLError

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
from mover.streams.s3_errors import error_from_reply, reply_code, reply_status, translate

WHERE = "s3://bucket/key"


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (503, "SlowDown", ObjectThrottledError),
        (503, "503", ObjectThrottledError),
        (429, "429", ObjectThrottledError),
        (400, "ThrottlingException", ObjectThrottledError),
        (400, "RequestLimitExceeded", ObjectThrottledError),
        (500, "InternalError", ObjectTransientError),
        (502, "502", ObjectTransientError),
        (400, "RequestTimeout", ObjectTransientError),
        (400, "BadDigest", ObjectTransientError),
        (400, "IncompleteBody", ObjectTransientError),
        (409, "OperationAborted", ObjectTransientError),
        (404, "NoSuchKey", ObjectMissingError),
        (404, "404", ObjectMissingError),
        (404, "NoSuchUpload", UploadMissingError),
        (404, "NoSuchBucket", ObjectAccessError),
        (412, "PreconditionFailed", ObjectChangedError),
        (403, "AccessDenied", ObjectAccessError),
        (403, "403", ObjectAccessError),
        (501, "NotImplemented", ObjectAccessError),
        (400, "MalformedXML", ObjectAccessError),
    ],
)
def test_replies_have_their_class(status: int, code: str, expected: type[MoverError]) -> None:
    error = error_from_reply("get", WHERE, status, code, "", {})
    assert type(error) is expected
    assert WHERE in str(error)


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        ("RequestTimeTooSkewed", "clock"),
        ("SignatureDoesNotMatch", "secret key"),
        ("InvalidAccessKeyId", "access key"),
        ("NoSuchBucket", "bucket"),
    ],
)
def test_refusals_say_what_to_look_at(code: str, hint: str) -> None:
    assert hint in str(error_from_reply("get", WHERE, 403, code, "", {}))


@pytest.mark.parametrize(
    ("headers", "expected_s"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "Sun, 06 Nov 1994 08:49:47 GMT", "date": "Sun, 06 Nov 1994 08:49:37 GMT"}, 10.0),
        ({"retry-after": "Sun, 06 Nov 1994 08:49:27 GMT", "date": "Sun, 06 Nov 1994 08:49:37 GMT"}, 0.0),
        ({"retry-after": "Sun, 06 Nov 1994 08:49:47 GMT"}, None),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read_as_seconds_and_as_date(headers: dict[str, str], expected_s: float | None) -> None:
    error = error_from_reply("put", WHERE, 503, "SlowDown", "", headers)
    assert isinstance(error, ObjectThrottledError)
    assert error.retry_after_s == expected_s


@pytest.mark.parametrize(
    ("exc", "expected"),
    [
        (ReadTimeoutError(endpoint_url="http://h"), StallError),
        (TimeoutError(), StallError),
        (EndpointConnectionError(endpoint_url="http://h", error=OSError("refused")), ObjectTransientError),
        (aiohttp.ClientPayloadError("short"), ObjectTransientError),
        (ConnectionResetError(), ObjectTransientError),
        (SSLError(endpoint_url="https://h", error=OSError("EOF occurred")), ObjectTransientError),
        (SSLError(endpoint_url="https://h", error=OSError("[SSL: CERTIFICATE_VERIFY_FAILED] x")), ObjectAccessError),
    ],
)
def test_failures_of_the_network_have_their_class(exc: BaseException, expected: type[MoverError]) -> None:
    assert type(translate("get", WHERE, exc, stall_timeout_s=3)) is expected


def test_secrets_of_addresses_stay_out_of_messages() -> None:
    cause = OSError("cannot reach http://user:hunter2@host:9000/b/k?X-Amz-Signature=abcdef&X-Amz-Credential=me")
    text = str(translate("get", WHERE, EndpointConnectionError(endpoint_url="http://h", error=cause)))
    assert "cannot reach http://host:9000/b/k" in text
    for secret in ("hunter2", "abcdef", "X-Amz"):
        assert secret not in text


def test_the_reply_behind_an_error_can_be_asked_for() -> None:
    reply = ClientError(
        {"Error": {"Code": "MalformedXML"}, "ResponseMetadata": {"HTTPStatusCode": 400}},  # type: ignore[typeddict-item]
        "DeleteObjects",
    )
    error = translate("delete", WHERE, reply)
    error.__cause__ = reply
    assert (reply_code(error), reply_status(error)) == ("MalformedXML", 400)
    assert (reply_code(StallError("get", WHERE, 1)), reply_status(StallError("get", WHERE, 1))) == ("", 0)
