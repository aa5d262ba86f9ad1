"""Single S3 requests whose replies are looked at as they are, to find out how a server behaves. Nothing is retried."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from mover.errors import MoverError
from mover.streams.s3_body import content_md5
from mover.streams.s3_calls import S3Endpoint, open_client
from mover.streams.s3_errors import FOREIGN_ERRORS, reply_code, reply_status, translate
from mover.streams.s3_listing import parse_page

if TYPE_CHECKING:
    from types_aiobotocore_s3.client import S3Client

__all__ = ["S3Probe", "S3Reply", "refusal_of"]

T = TypeVar("T")


class S3Reply(msgspec.Struct, frozen=True):
    """A reply: status, headers with lower-case names, body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def etag(self) -> str:
        """Without quotes."""
        return self.headers.get("etag", "").strip('"')


def refusal_of(error: MoverError) -> tuple[int, str]:
    """HTTP status and S3 error code behind an error; 0 when the server did not answer."""
    return reply_status(error), reply_code(error)


class S3Probe:
    """One attempt per call. Raises MoverError for every reply that is a refusal: see ``refusal_of``."""

    def __init__(self, client: S3Client, endpoint: S3Endpoint) -> None:
        self._client, self._endpoint = client, endpoint

    @classmethod
    @asynccontextmanager
    async def open(cls, endpoint: S3Endpoint) -> AsyncIterator[S3Probe]:
        """A probe with its connections; no request is sent."""
        async with open_client(endpoint, endpoint.endpoint_url) as client:
            yield cls(client, endpoint)

    async def put(self, bucket: str, key: str, body: bytes, *, md5_of: bytes | None = None) -> str:
        """Writes an object under the Content-MD5 of ``md5_of`` (by default of the body itself); returns its ETag."""
        md5 = await content_md5(body if md5_of is None else md5_of)
        reply = await self._call(
            "put", bucket, key, lambda: self._client.put_object(Bucket=bucket, Key=key, Body=body, ContentMD5=md5)
        )
        return str(reply["ETag"]).strip('"')

    async def get(self, bucket: str, key: str, *, if_match: str = "", ranged: tuple[int, int] | None = None) -> S3Reply:
        """Reads an object, on condition of an ETag and in part (half-open range) where given."""
        request: dict[str, Any] = {"Bucket": bucket, "Key": key}
        if if_match:
            request["IfMatch"] = f'"{if_match}"'
        if ranged is not None:
            request["Range"] = f"bytes={ranged[0]}-{ranged[1] - 1}"

        async def read() -> S3Reply:
            reply = await self._client.get_object(**request)
            async with reply["Body"] as stream:
                body = await stream.read()
            data = reply["ResponseMetadata"]
            return S3Reply(data["HTTPStatusCode"], {k.lower(): v for k, v in data["HTTPHeaders"].items()}, body)

        return await self._call("get", bucket, key, read)

    async def list_page(self, bucket: str, prefix: str, keys_at_most: int, token: str = "") -> tuple[list[str], str]:
        """Keys of one page, without the prefix, and the token of the next page ('' when there is none)."""
        request: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": keys_at_most, "EncodingType": "url"}
        if token:
            request["ContinuationToken"] = token

        async def read() -> tuple[list[str], str]:
            reply: Any = await self._client.list_objects_v2(**request)
            page = parse_page(reply["Page"], prefix, f"s3://{bucket}/{prefix}")
            return [item.path for item in page.objects], page.token or ""

        return await self._call("list", bucket, prefix, read)

    async def uploads(self, bucket: str, prefix: str) -> list[str]:
        """Keys of unfinished multipart uploads below ``prefix``."""
        reply = await self._call(
            "list-uploads", bucket, prefix, lambda: self._client.list_multipart_uploads(Bucket=bucket, Prefix=prefix)
        )
        return [str(item.get("Key", "")) for item in reply.get("Uploads", ())]

    async def delete_batch(self, bucket: str, keys: list[str]) -> None:
        """Deletes keys in one request."""
        deletion: Any = {"Quiet": True, "Objects": [{"Key": key} for key in keys]}
        await self._call(
            "delete-batch", bucket, "", lambda: self._client.delete_objects(Bucket=bucket, Delete=deletion)
        )

    async def clock_skew_s(self, bucket: str) -> float | None:
        """Seconds that the server's clock is ahead of this host's; None when it does not tell. Exact to a second."""
        before = time.time()
        reply = await self._call("head", bucket, "", lambda: self._client.head_bucket(Bucket=bucket))
        date = reply["ResponseMetadata"]["HTTPHeaders"].get("date")
        if not date:
            return None
        middle = (before + time.time()) / 2
        return parsedate_to_datetime(date).timestamp() + 0.5 - middle

    async def _call(self, op: str, bucket: str, key: str, request: Callable[[], Awaitable[T]]) -> T:
        location = f"s3://{bucket}/{key}"
        try:
            return await request()
        except FOREIGN_ERRORS as exc:
            raise translate(op, location, exc, stall_timeout_s=self._endpoint.stall_timeout_s) from exc
