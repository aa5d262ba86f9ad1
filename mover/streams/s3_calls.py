"""One S3 endpoint: its connection pool, and the way each request goes out (counted, translated, retried)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Final, TypeVar

import anyio
import msgspec
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession, get_session
from botocore.handlers import add_expect_header

from mover.errors import MoverError
from mover.policies.retry import RetryPolicy, retry_class, retrying
from mover.streams.interfaces import Buffer
from mover.streams.s3_body import ViewPayload, md5_base64
from mover.streams.s3_errors import FOREIGN_ERRORS, translate

if TYPE_CHECKING:
    from types_aiobotocore_s3.client import S3Client

__all__ = ["S3Calls", "S3Endpoint", "S3Statistics", "open_client"]

T = TypeVar("T")

_CHECKSUM_HEADERS: Final = ("x-amz-checksum-crc32", "x-amz-sdk-checksum-algorithm")


class S3Endpoint(msgspec.Struct, frozen=True):
    """Where an S3 storage is and how to get in; ``external_endpoint_url`` is what presigned links name, if another."""

    endpoint_url: str
    region: str
    access_key: str
    secret_key: str
    external_endpoint_url: str | None = None
    connect_timeout_s: float = 10.0
    stall_timeout_s: float = 60.0
    max_connections: int = 32

    def __repr__(self) -> str:
        return f"S3Endpoint({self.endpoint_url!r}, region={self.region!r}, access_key='***', secret_key='***')"


class S3Statistics(msgspec.Struct, frozen=True):
    """Counters of one store: requests by operation, body bytes sent (repeats included), retries by class."""

    requests: dict[str, int]
    sent_bytes: int
    retries: dict[str, int]


class S3Calls:
    """A client with the policy around it. ``call`` is the only way to the server."""

    def __init__(
        self,
        client: S3Client,
        endpoint: S3Endpoint,
        policy: RetryPolicy,
        *,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
        rng: Callable[[], float] = random.random,
    ) -> None:
        self.client, self.endpoint = client, endpoint
        self._policy, self._sleep, self._rng = policy, sleep, rng
        self._requests: Counter[str] = Counter()
        self._retries: Counter[str] = Counter()
        self._sent_bytes = 0

    async def call(self, op: str, location: str, request: Callable[[], Awaitable[T]]) -> T:
        """One operation under the retry policy; ``request`` is called once for each attempt.

        aiohttp itself repeats an idempotent request once when its connection breaks; that is not counted.
        """

        async def attempt() -> T:
            self._requests[op] += 1
            try:
                return await request()
            except FOREIGN_ERRORS as exc:
                raise translate(op, location, exc, stall_timeout_s=self.endpoint.stall_timeout_s) from exc

        return await retrying(attempt, self._policy, sleep=self._sleep, rng=self._rng, on_retry=self._count_retry)

    def body(self, body: Buffer) -> Any:  # noqa: ANN401 - aiohttp's payload in the place of botocore's file
        """A body for one attempt; its bytes are counted as they leave."""
        if not memoryview(body).nbytes:
            return b""
        return ViewPayload(body, self.endpoint.stall_timeout_s, self._count_sent)

    def statistics(self) -> S3Statistics:
        """The counters so far."""
        return S3Statistics(dict(self._requests), self._sent_bytes, dict(self._retries))

    def _count_retry(self, error: MoverError, attempt: int, pause_s: float) -> None:  # noqa: ARG002 - the hook's shape
        self._retries[retry_class(error)] += 1

    def _count_sent(self, size_bytes: int) -> None:
        self._sent_bytes += size_bytes


@cache
def _session() -> AioSession:
    """One for all clients of the process: each new one reads botocore's models again."""
    return get_session()


@asynccontextmanager
async def open_client(endpoint: S3Endpoint, endpoint_url: str) -> AsyncIterator[S3Client]:
    """A client that speaks plain S3: path style, SigV4, no checksums of its own, no retries of its own."""
    config = AioConfig(
        signature_version="s3v4",
        s3={"addressing_style": "path", "payload_signing_enabled": False},  # Content-MD5 is signed: hash bodies once
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        retries={"total_max_attempts": 1, "mode": "standard"},
        connect_timeout=endpoint.connect_timeout_s,
        read_timeout=endpoint.stall_timeout_s,
        max_pool_connections=endpoint.max_connections,
        warm_up_loader_caches=True,  # reads botocore's models in a thread, not on the loop
    )
    async with _session().create_client(
        "s3",
        endpoint_url=endpoint_url,
        region_name=endpoint.region,
        aws_access_key_id=endpoint.access_key,
        aws_secret_access_key=endpoint.secret_key,
        config=config,
    ) as client:
        events = client.meta.events
        events.unregister("before-call.s3", add_expect_header)  # a server that never says 100 would hang each upload
        events.register("before-sign.s3.DeleteObjects", _only_md5)
        events.register("before-parse.s3.ListObjectsV2", _keep_listing)
        yield client


def _only_md5(request: Any, **_: object) -> None:  # noqa: ANN401 - botocore's AWSRequest is untyped
    """Makes Content-MD5 the only checksum of a batch delete: several servers know no other."""
    request.headers["Content-MD5"] = md5_base64(request.data)
    for name in _CHECKSUM_HEADERS:
        if name in request.headers:
            del request.headers[name]


def _keep_listing(response_dict: Any, customized_response_dict: Any, **_: object) -> None:  # noqa: ANN401 - untyped hook
    """Keeps a page's XML out of botocore's parser, which needs twenty times as long as ours and blocks the loop."""
    if response_dict["status_code"] == 200:
        customized_response_dict["Page"] = response_dict["body"]
        response_dict["body"] = b"<ListBucketResult/>"
