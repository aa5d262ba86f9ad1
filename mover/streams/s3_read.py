"""Reading objects: small ones through obstore, many in flight; large ones through worker threads and reused buffers.

Why two ways: see "Dependencies" in ARCHITECTURE.md, which has the rates of each.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import anyio.to_thread
import msgspec
import obstore.exceptions
import obstore.store

from mover.errors import (
    MoverError,
    ObjectChangedError,
    ObjectMissingError,
    ObjectTransientError,
    ShortReadError,
    StallError,
)
from mover.streams.interfaces import Buffer, ByteRange, Consumer
from mover.streams.s3_http import HttpRanges, RangeRequest
from mover.tasks import open_task_group

if TYPE_CHECKING:
    from mover.streams.s3 import S3Endpoint

__all__ = ["ReaderStatistics", "S3Reader"]

_OP = "GET"
_CHUNK_BYTES = 256 << 10
_IDLE = timedelta(seconds=10)  # a connection kept longer may lead nowhere, and only a stall would tell


class ReaderStatistics(msgspec.Struct, frozen=True):
    """What was asked for and received since the reader was opened; retried bytes count each time."""

    requests: int
    received_bytes: int


class S3Reader:
    """``ObjectReader`` for all buckets of one endpoint. Open it with :meth:`open`; belongs to one event loop."""

    def __init__(self, endpoint: S3Endpoint, ranges: HttpRanges, threads: int) -> None:
        self._endpoint, self._ranges = endpoint, ranges
        self._threads = anyio.CapacityLimiter(threads)
        self._stores: dict[str, obstore.store.S3Store] = {}
        self._requests = 0
        self._received_bytes = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, endpoint: S3Endpoint, *, threads: int) -> AsyncIterator[S3Reader]:
        """A reader with at most ``threads`` ranges streaming at a time."""
        ranges = HttpRanges(
            endpoint.endpoint_url,
            endpoint.region,
            endpoint.access_key,
            endpoint.secret_key,
            connect_timeout_s=endpoint.connect_timeout_s,
            stall_timeout_s=endpoint.stall_timeout_s,
        )
        try:
            yield cls(endpoint, ranges, threads)
        finally:
            ranges.close()

    def statistics(self) -> ReaderStatistics:
        """Counters so far."""
        return ReaderStatistics(self._requests, self._received_bytes)

    async def fetch(self, item: ByteRange, view: memoryview) -> None:
        """See ``ObjectReader``."""
        if not _fits_obstore(item.key):
            await self._fetch_by_thread(item, view)
            return
        self._requests += 1
        try:
            received_bytes = await self._get(item, view)
        except TimeoutError as exc:
            raise StallError(_OP, item.location, self._endpoint.stall_timeout_s) from exc
        except obstore.exceptions.NotFoundError as exc:
            raise ObjectMissingError(_OP, item.location) from exc
        except obstore.exceptions.PreconditionError as exc:
            raise ObjectChangedError(_OP, item.location, "ETag", item.etag, "another one") from exc
        except (obstore.exceptions.BaseError, OSError):
            # obstore tells the kinds of failure apart by text only; the plain request does by status and code
            await self._fetch_by_thread(item, view)
            return
        if received_bytes != item.size_bytes:
            raise ShortReadError(_OP, item.location, item.size_bytes, received_bytes)
        self._received_bytes += received_bytes

    async def stream(self, item: ByteRange, buffer: memoryview, consume: Consumer) -> None:
        """See ``ObjectReader``."""
        self._requests += 1
        request = self._ranges.request(item)
        async with open_task_group() as tasks:
            tasks.start_soon(_abort_when_cancelled, request)
            try:
                await anyio.to_thread.run_sync(request.receive, buffer, self._counted(consume), limiter=self._threads)
            except MoverError:
                await anyio.lowlevel.checkpoint_if_cancelled()  # then the failure is that of the aborted request
                raise
            tasks.cancel_scope.cancel()

    def _counted(self, consume: Consumer) -> Consumer:
        def counted(piece: memoryview) -> None:
            self._received_bytes += len(piece)
            consume(piece)

        return counted

    async def _fetch_by_thread(self, item: ByteRange, view: memoryview) -> None:
        await self.stream(item, view, lambda _: None)  # one piece, which stays where it was received

    async def _get(self, item: ByteRange, view: memoryview) -> int:
        """Bytes received; no more than a chunk of them is held besides ``view``."""
        options: obstore.GetOptions = {"if_match": f'"{item.etag}"'}
        if item.size_bytes != item.object_bytes:
            options["range"] = (item.start, item.end)
        stall_timeout_s = self._endpoint.stall_timeout_s
        with anyio.fail_after(stall_timeout_s):
            result = await obstore.get_async(self._store(item.bucket), item.key, options=options)
        etag = (result.meta["e_tag"] or "").strip('"')
        if etag != item.etag:  # a reply without one proves nothing
            raise ObjectChangedError(_OP, item.location, "ETag", item.etag, etag)
        if result.meta["size"] != item.object_bytes:
            raise ObjectChangedError(_OP, item.location, "size", item.object_bytes, result.meta["size"])
        if tuple(result.range) != (item.start, item.end):
            raise ObjectTransientError(_OP, item.location, "the server answered another range")
        if item.size_bytes <= _CHUNK_BYTES:
            with anyio.fail_after(stall_timeout_s):
                return _put(view, 0, await result.bytes_async())
        position = 0
        chunks = aiter(result.stream(min_chunk_size=_CHUNK_BYTES))
        while position < item.size_bytes:  # in chunks, so that a slow body is no stall
            with anyio.fail_after(stall_timeout_s):
                chunk = await anext(chunks, None)
            if chunk is None:
                break
            position = _put(view, position, chunk)
        return position

    def _store(self, bucket: str) -> obstore.store.S3Store:
        if bucket not in self._stores:
            endpoint = self._endpoint
            self._stores[bucket] = obstore.store.S3Store(
                bucket,
                endpoint=endpoint.endpoint_url,
                region=endpoint.region,
                access_key_id=endpoint.access_key,
                secret_access_key=endpoint.secret_key,
                virtual_hosted_style_request=False,
                client_options={
                    "allow_http": endpoint.endpoint_url.startswith("http://"),
                    "connect_timeout": timedelta(seconds=endpoint.connect_timeout_s),
                    "timeout": timedelta(days=1),  # stalls are watched here, not total times
                    "pool_idle_timeout": _IDLE,
                },
                retry_config={"max_retries": 0},
            )
        return self._stores[bucket]


def _put(view: memoryview, position: int, chunk: Buffer | obstore.Bytes) -> int:
    """Copies as much of ``chunk`` as there is room for; returns where it ends, beyond the view when it is too long."""
    end = position + len(chunk)
    view[position:end] = memoryview(chunk)[: len(view) - position]
    return end


async def _abort_when_cancelled(request: RangeRequest) -> None:
    """Ends the blocked thread of a cancelled stream; harmless after a finished one."""
    try:
        await anyio.sleep_forever()
    finally:
        request.abort()


def _fits_obstore(key: str) -> bool:
    """Whether obstore's path type holds the key: it refuses control characters and dots, and folds empty segments."""
    return key.isprintable() and {"", ".", ".."}.isdisjoint(key.split("/"))
