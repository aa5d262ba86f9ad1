"""The control plane of an S3 storage, and the way up: list, head, put, delete, presign, multipart."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, cast

import anyio

from mover.errors import ObjectAccessError, ObjectMissingError
from mover.model import SourceChecksum, SourceObject
from mover.policies.retry import RetryPolicy
from mover.streams.interfaces import Buffer, MultipartUpload, ReleaseResult
from mover.streams.s3_body import content_md5
from mover.streams.s3_calls import S3Calls, S3Endpoint, S3Statistics, open_client
from mover.streams.s3_checksums import source_checksum
from mover.streams.s3_delete import S3Deletes
from mover.streams.s3_errors import reply_code
from mover.streams.s3_listing import list_pages
from mover.streams.s3_upload import S3Uploads, etag_is_md5, stored_etag

if TYPE_CHECKING:
    from types_aiobotocore_s3.client import S3Client
    from types_aiobotocore_s3.literals import BucketLocationConstraintType
    from types_aiobotocore_s3.type_defs import CreateBucketRequestTypeDef, HeadObjectOutputTypeDef

__all__ = ["S3Endpoint", "S3Statistics", "S3Store"]


class S3Store:
    """ObjectStore over aiobotocore. Safe to use from many tasks of one event loop."""

    def __init__(self, calls: S3Calls, presigner: S3Client) -> None:
        self._calls, self._presigner = calls, presigner
        self._deletes, self._uploads = S3Deletes(calls), S3Uploads(calls)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        config: S3Endpoint,
        *,
        policy: RetryPolicy | None = None,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
        rng: Callable[[], float] = random.random,
    ) -> AsyncIterator[S3Store]:
        """A store with its connection pool; no request is sent. ``sleep`` and ``rng`` serve the retry policy."""
        async with open_client(config, config.endpoint_url) as client:
            calls = S3Calls(client, config, policy or RetryPolicy(), sleep=sleep, rng=rng)
            if config.external_endpoint_url is None:
                yield cls(calls, client)
                return
            async with open_client(config, config.external_endpoint_url) as presigner:
                yield cls(calls, presigner)

    def statistics(self) -> S3Statistics:
        """Counters since the store was opened."""
        return self._calls.statistics()

    async def list_objects(self, bucket: str, prefix: str) -> AsyncIterator[SourceObject]:
        """See ObjectStore."""
        async for page in list_pages(self._calls, bucket, prefix):
            for item in page:
                yield item

    async def head(self, bucket: str, key: str) -> SourceObject:
        """See ObjectStore. A HEAD reply cannot tell a missing bucket from a missing object."""
        return (await self.describe(bucket, key))[0]

    async def describe(self, bucket: str, key: str) -> tuple[SourceObject, dict[str, str]]:
        """As ``head``, with the object's metadata, names in lower case."""
        reply = await self._head(bucket, key)
        mtime_s = int(reply["LastModified"].timestamp())
        found = SourceObject(key, reply["ContentLength"], reply["ETag"].strip('"'), mtime_s)
        return found, {name.lower(): value for name, value in reply.get("Metadata", {}).items()}

    async def etag_is_md5(self, bucket: str, key: str) -> bool:
        """Whether the object's ETag is made of MD5s: false under SSE-KMS and customers' keys. Ask after a mismatch."""
        return etag_is_md5(await self._head(bucket, key))

    async def source_checksum(self, bucket: str, key: str, etag: str, size_bytes: int) -> SourceChecksum | None:
        """See ObjectStore."""
        return await source_checksum(self._calls, bucket, key, etag, size_bytes)

    async def put(self, bucket: str, key: str, body: Buffer, metadata: dict[str, str]) -> str:
        """See ObjectStore."""
        md5 = await content_md5(body)

        async def request() -> str:
            reply = await self._calls.client.put_object(
                Bucket=bucket, Key=key, Body=self._calls.body(body), ContentMD5=md5, Metadata=metadata
            )
            return stored_etag("put", f"s3://{bucket}/{key}", reply, md5)

        return await self._calls.call("put", f"s3://{bucket}/{key}", request)

    async def delete(self, bucket: str, keys: Sequence[str]) -> ReleaseResult:
        """See ObjectStore."""
        return await self._deletes.delete(bucket, keys)

    async def presign(self, bucket: str, key: str, expires_s: int) -> str:
        """See ObjectStore. Signed locally: no request is sent, and the object need not exist."""
        return await self._presigner.generate_presigned_url(
            "get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=expires_s
        )

    async def begin(self, bucket: str, key: str, metadata: dict[str, str]) -> MultipartUpload:
        """See MultipartSink."""
        return await self._uploads.begin(bucket, key, metadata)

    async def put_part(self, upload: MultipartUpload, number: int, body: Buffer) -> str:
        """See MultipartSink."""
        return await self._uploads.put_part(upload, number, body)

    async def list_parts(self, upload: MultipartUpload) -> dict[int, tuple[str, int]]:
        """What has arrived of an upload: ETag and size in bytes by part number.  Raises UploadMissingError."""
        return await self._uploads.list_parts(upload)

    async def complete(self, upload: MultipartUpload, etags: Sequence[str]) -> str:
        """See MultipartSink. Raises UploadMissingError, and DigestMismatchError when other parts were joined."""
        return await self._uploads.complete(upload, etags)

    async def abort(self, upload: MultipartUpload) -> None:
        """See MultipartSink."""
        await self._uploads.abort(upload)

    async def create_bucket_if_missing(self, bucket: str) -> bool:
        """Makes a bucket, for demonstrations and tests; true when it was not there."""
        location = f"s3://{bucket}"
        try:
            await self._calls.call("head", location, lambda: self._calls.client.head_bucket(Bucket=bucket))
        except ObjectMissingError:
            pass
        else:
            return False
        try:
            await self._create_bucket(bucket, None)
        except ObjectAccessError as error:
            if reply_code(error) == "BucketAlreadyOwnedByYou":
                return False
            if reply_code(error) != "IllegalLocationConstraintException":
                raise
            await self._create_bucket(bucket, self._calls.endpoint.region)
        return True

    async def _create_bucket(self, bucket: str, region: str | None) -> None:
        request: CreateBucketRequestTypeDef = {"Bucket": bucket}
        if region is not None:  # only AWS asks for it, others refuse it
            request["CreateBucketConfiguration"] = {"LocationConstraint": cast("BucketLocationConstraintType", region)}
        client = self._calls.client
        await self._calls.call("create-bucket", f"s3://{bucket}", lambda: client.create_bucket(**request))

    async def _head(self, bucket: str, key: str) -> HeadObjectOutputTypeDef:
        client = self._calls.client
        return await self._calls.call(
            "head", f"s3://{bucket}/{key}", lambda: client.head_object(Bucket=bucket, Key=key)
        )
