"""Multipart uploads: parts from memory with their Content-MD5, an end that survives a lost reply."""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

from mover.errors import (
    DigestMismatchError,
    ObjectAccessError,
    ObjectMissingError,
    ObjectTransientError,
    UploadMissingError,
)
from mover.streams.checksums import composite_md5
from mover.streams.interfaces import Buffer, MultipartUpload
from mover.streams.s3_body import content_md5
from mover.streams.s3_calls import S3Calls

if TYPE_CHECKING:
    from types_aiobotocore_s3.type_defs import (
        CompletedPartTypeDef,
        HeadObjectOutputTypeDef,
        PutObjectOutputTypeDef,
        UploadPartOutputTypeDef,
    )

__all__ = ["S3Uploads", "etag_is_md5", "stored_etag"]

T = TypeVar("T")

_MD5: Final = re.compile(r"[0-9a-f]{32}")
_COMPOSITE: Final = re.compile(r"[0-9a-f]{32}-\d+")
_KEYED: Final = frozenset({"aws:kms", "aws:kms:dsse", "aws:fsx"})


def etag_is_md5(reply: HeadObjectOutputTypeDef | PutObjectOutputTypeDef | UploadPartOutputTypeDef) -> bool:
    """Whether the ETag is made of MD5s: not under SSE-KMS or a customer's key."""
    return not reply.get("SSECustomerAlgorithm") and str(reply.get("ServerSideEncryption", "")) not in _KEYED


def stored_etag(op: str, location: str, reply: PutObjectOutputTypeDef | UploadPartOutputTypeDef, md5: str) -> str:
    """The ETag of what was stored; some servers take Content-MD5 without checking it, so it is compared here.

    Args:
        op: what was done.
        location: of the object.
        reply: of the request that stored it.
        md5: of the bytes that were sent, in base64.

    Raises:
        ObjectTransientError: other bytes were stored than sent.
    """
    etag = reply["ETag"].strip('"')
    if _MD5.fullmatch(etag) and etag != b64decode(md5).hex() and etag_is_md5(reply):
        raise ObjectTransientError(op, location, "other bytes were stored")
    return etag


class S3Uploads:
    """The multipart half of a store."""

    def __init__(self, calls: S3Calls) -> None:
        self._calls = calls

    async def begin(self, bucket: str, key: str, metadata: dict[str, str]) -> MultipartUpload:
        """See MultipartSink. A repeat after a lost reply leaves an upload behind, for the bucket's lifecycle rule."""

        async def request() -> str:
            reply = await self._calls.client.create_multipart_upload(Bucket=bucket, Key=key, Metadata=metadata)
            return reply["UploadId"]

        return MultipartUpload(bucket, key, await self._calls.call("begin", f"s3://{bucket}/{key}", request))

    async def put_part(self, upload: MultipartUpload, number: int, body: Buffer) -> str:
        """See MultipartSink."""
        md5 = await content_md5(body)

        async def request() -> str:
            reply = await self._calls.client.upload_part(
                Bucket=upload.bucket,
                Key=upload.key,
                UploadId=upload.upload_id,
                PartNumber=number,
                Body=self._calls.body(body),
                ContentMD5=md5,
            )
            return stored_etag("put-part", _location(upload), reply, md5)

        return await self._part_call("put-part", upload, request)

    async def list_parts(self, upload: MultipartUpload) -> dict[int, tuple[str, int]]:
        """What has arrived: ETag and size in bytes by part number.  Raises UploadMissingError."""
        parts: dict[int, tuple[str, int]] = {}
        marker, more = 0, True

        async def request() -> tuple[dict[int, tuple[str, int]], int, bool]:
            reply = await self._calls.client.list_parts(
                Bucket=upload.bucket, Key=upload.key, UploadId=upload.upload_id, PartNumberMarker=marker
            )
            page = {part["PartNumber"]: (part["ETag"].strip('"'), part["Size"]) for part in reply.get("Parts", ())}
            return page, max(page, default=marker), reply.get("IsTruncated", False)

        while more:
            before = marker
            page, marker, more = await self._part_call("list-parts", upload, request)
            if more and marker == before:
                raise ObjectAccessError("list-parts", _location(upload), "the listing does not advance")
            parts |= page
        return parts

    async def complete(self, upload: MultipartUpload, etags: Sequence[str]) -> str:
        """See MultipartSink.

        An upload that is gone may have been completed by a request whose reply was lost: the object under the key
        then has exactly the ETag that the parts make.

        Raises:
            UploadMissingError: the upload is gone and the object is not its outcome.
            DigestMismatchError: the server joined other parts than these.
        """
        expected = composite_md5(etags)
        try:
            found = await self._part_call("complete", upload, lambda: self._complete(upload, etags))
        except (UploadMissingError, ObjectTransientError):
            if expected is not None and await self._etag(upload) == expected:
                return expected
            await self.list_parts(upload)  # some servers have nothing but 5xx for an upload that is gone
            raise
        if found == expected:
            return found
        head = await self._head(upload)  # some servers leave the ETag out of the reply
        found = head["ETag"].strip('"')
        if expected not in {None, found} and _COMPOSITE.fullmatch(found) and etag_is_md5(head):
            raise DigestMismatchError(_location(upload), "md5-parts", str(expected), found, "S3 server")
        return found

    async def abort(self, upload: MultipartUpload) -> None:
        """See MultipartSink."""

        async def request() -> None:
            await self._calls.client.abort_multipart_upload(
                Bucket=upload.bucket, Key=upload.key, UploadId=upload.upload_id
            )

        try:
            await self._calls.call("abort", _location(upload), request)
        except (UploadMissingError, ObjectMissingError):
            return

    async def _part_call(self, op: str, upload: MultipartUpload, request: Callable[[], Awaitable[T]]) -> T:
        """As ``call``; some servers say NoSuchKey of an upload that is gone."""
        try:
            return await self._calls.call(op, _location(upload), request)
        except ObjectMissingError as error:
            raise UploadMissingError(op, _location(upload)) from error

    async def _complete(self, upload: MultipartUpload, etags: Sequence[str]) -> str:
        parts: list[CompletedPartTypeDef] = [
            {"PartNumber": number, "ETag": f'"{etag}"'} for number, etag in enumerate(etags, start=1)
        ]
        reply = await self._calls.client.complete_multipart_upload(
            Bucket=upload.bucket, Key=upload.key, UploadId=upload.upload_id, MultipartUpload={"Parts": parts}
        )
        return reply.get("ETag", "").strip('"')

    async def _etag(self, upload: MultipartUpload) -> str:
        try:
            return (await self._head(upload))["ETag"].strip('"')
        except ObjectMissingError:
            return ""

    async def _head(self, upload: MultipartUpload) -> HeadObjectOutputTypeDef:
        return await self._calls.call(
            "head", _location(upload), lambda: self._calls.client.head_object(Bucket=upload.bucket, Key=upload.key)
        )


def _location(upload: MultipartUpload) -> str:
    return f"s3://{upload.bucket}/{upload.key}"
