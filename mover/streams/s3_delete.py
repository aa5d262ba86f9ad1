"""Deletes: in batches where the server takes them, key by key where it does not or where XML cannot carry the key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Final

import anyio

from mover.errors import MoverError, ObjectAccessError, ObjectMissingError
from mover.streams.interfaces import ReleaseResult
from mover.streams.s3_calls import S3Calls
from mover.streams.s3_errors import error_from_reply, reply_code, reply_status

if TYPE_CHECKING:
    from types_aiobotocore_s3.type_defs import DeleteObjectsOutputTypeDef

__all__ = ["S3Deletes"]

_BATCH_KEYS: Final = 1000
_CONCURRENCY: Final = 16
_REFUSALS: Final = frozenset({
    "BadRequest", "InvalidArgument", "InvalidDigest", "InvalidRequest", "MalformedXML", "MethodNotAllowed",
    "MissingContentMD5",
    "NotImplemented", "NotSupported", "UnsupportedOperation",
})  # fmt: skip
_UNSAFE_IN_XML: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ufffe\uffff]|^\s|\s$")


class S3Deletes:
    """Deletes keys of one endpoint; remembers that it refuses batches."""

    def __init__(self, calls: S3Calls) -> None:
        self._calls = calls
        self._batches = True

    async def delete(self, bucket: str, keys: Sequence[str]) -> ReleaseResult:
        """See ObjectStore. Keys that a parser might normalise go alone, lest another key be hit."""
        failed: dict[str, str] = {}
        alone = [key for key in keys if _UNSAFE_IN_XML.search(key)]
        plain = (key for key in keys if not _UNSAFE_IN_XML.search(key))
        while batch := list(islice(plain, _BATCH_KEYS)):
            alone += await self._delete_batch(bucket, batch, failed) if self._batches else batch
        await self._delete_singly(bucket, alone, failed)
        return ReleaseResult(tuple(key for key in keys if key not in failed), tuple(failed.items()))

    async def _delete_batch(self, bucket: str, keys: list[str], failed: dict[str, str]) -> list[str]:
        """Deletes a batch; returns the keys that have to be tried alone."""
        location = f"s3://{bucket}"

        async def request() -> DeleteObjectsOutputTypeDef:
            return await self._calls.client.delete_objects(
                Bucket=bucket, Delete={"Quiet": True, "Objects": [{"Key": key} for key in keys]}
            )

        try:
            reply = await self._calls.call("delete-batch", location, request)
        except ObjectAccessError as error:
            if reply_status(error) not in {400, 405, 411, 501} and reply_code(error) not in _REFUSALS:
                raise
            if reply_code(error) == "NoSuchBucket":
                raise
            self._batches = False
            return keys
        again = []
        for item in reply.get("Errors", ()):
            key, code = item.get("Key", ""), item.get("Code", "")
            reason = error_from_reply("delete", f"{location}/{key}", 0, code, item.get("Message") or "", {})
            if reason.retryable or code in _REFUSALS:
                again.append(key)
            elif not isinstance(reason, ObjectMissingError):
                failed[key] = str(reason)
        return again

    async def _delete_singly(self, bucket: str, keys: list[str], failed: dict[str, str]) -> None:
        remaining = iter(keys)
        async with anyio.create_task_group() as tasks:
            for _ in range(min(_CONCURRENCY, len(keys))):
                tasks.start_soon(self._delete_some, bucket, remaining, failed)

    async def _delete_some(self, bucket: str, remaining: Iterator[str], failed: dict[str, str]) -> None:
        for key in remaining:
            try:
                await self._delete_one(bucket, key)
            except ObjectMissingError:
                continue
            except MoverError as error:
                failed[key] = str(error)

    async def _delete_one(self, bucket: str, key: str) -> None:
        async def request() -> None:
            await self._calls.client.delete_object(Bucket=bucket, Key=key)

        await self._calls.call("delete", f"s3://{bucket}/{key}", request)
