"""The contracts of everything that carries bytes. Implementations sit beside this file and do not repeat them.

Blocking methods say so; they are called in worker threads, never on the event loop. All ranges are half-open.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

import msgspec

from mover.model import SourceChecksum, SourceObject

__all__ = [
    "Buffer",
    "ByteRange",
    "Consumer",
    "MultipartSink",
    "MultipartUpload",
    "ObjectReader",
    "ObjectStore",
    "PositionalSink",
    "ReleaseResult",
]

Buffer = bytes | bytearray | memoryview
"""Bytes that are written or hashed without a copy."""

Consumer = Callable[[memoryview], None]
"""Takes the next bytes of a stream, in order, in the worker thread that received them; must not keep the view."""


class ByteRange(msgspec.Struct, frozen=True, gc=False):
    """Bytes ``start`` to ``end`` (exclusive) of one object, pinned by its ETag (without quotes) and its whole size."""

    bucket: str
    key: str
    etag: str
    object_bytes: int
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Number of bytes in the range."""
        return self.end - self.start

    @property
    def location(self) -> str:
        """What errors and logs call it."""
        return f"s3://{self.bucket}/{self.key}"


class ObjectReader(Protocol):
    """Reads pinned ranges of objects. One attempt per call: retrying is a policy and happens above.

    Every response's status, ETag, length and Content-Range are compared with the request.

    Raises:
        ObjectMissingError: the object is gone.
        ObjectChangedError: the ETag or the whole size is not the pinned one.
        ObjectAccessError: credentials or permissions.
        ObjectThrottledError, ObjectTransientError, StallError, ShortReadError: worth another attempt.
    """

    async def fetch(self, item: ByteRange, view: memoryview) -> None:
        """Fills ``view``, which is as long as the range, with all of it; for ranges of a few MiB.

        Cancellation drops the request and lets go of ``view``.
        """
        ...

    async def stream(self, item: ByteRange, buffer: memoryview, consume: Consumer) -> None:
        """Receives the range into ``buffer`` piece by piece and hands each piece to ``consume``.

        Receiving and consuming happen in one worker thread. When it raises, the pieces consumed so far are good: the
        caller goes on from there. Cancellation shuts the connection and returns once the thread let go of ``buffer``.
        """
        ...


class ReleaseResult(msgspec.Struct, frozen=True):
    """Outcome of a batch delete: keys that are gone, and (key, reason) of those that are not."""

    deleted: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]


class MultipartUpload(msgspec.Struct, frozen=True):
    """A multipart upload under way; survives the process that began it."""

    bucket: str
    key: str
    upload_id: str


class MultipartSink(Protocol):
    """Where large objects are written: parts of bounded size, announced only at the end."""

    async def begin(self, bucket: str, key: str, metadata: dict[str, str]) -> MultipartUpload:
        """Starts an upload; nothing is visible under the key until ``complete``."""
        ...

    async def put_part(self, upload: MultipartUpload, number: int, body: Buffer) -> str:
        """Sends part ``number`` (from 1) with its ``Content-MD5``; returns the part's ETag. Safe to repeat."""
        ...

    async def complete(self, upload: MultipartUpload, etags: Sequence[str]) -> str:
        """Joins the parts in order; returns the object's ETag."""
        ...

    async def abort(self, upload: MultipartUpload) -> None:
        """Drops the upload and its parts; an upload that is gone already is fine."""
        ...


class ObjectStore(MultipartSink, Protocol):
    """The control plane of one S3 endpoint. Errors as of ObjectReader; each call applies the retry policy itself."""

    def list_objects(self, bucket: str, prefix: str) -> AsyncIterator[SourceObject]:
        """All objects below ``prefix`` in key order, page by page; ``path`` is the key without the prefix."""
        ...

    async def head(self, bucket: str, key: str) -> SourceObject:
        """One object; ``path`` is the key.  Raises ObjectMissingError."""
        ...

    async def source_checksum(self, bucket: str, key: str, etag: str, size_bytes: int) -> SourceChecksum | None:
        """The strongest checksum of the whole object that the server can be held to; None when it offers none."""
        ...

    async def put(self, bucket: str, key: str, body: Buffer, metadata: dict[str, str]) -> str:
        """Writes one object in one request with its ``Content-MD5``; returns its ETag."""
        ...

    async def delete(self, bucket: str, keys: Sequence[str]) -> ReleaseResult:
        """Deletes in batches of at most 1,000, or key by key where those are refused. Missing keys count as deleted."""
        ...

    async def presign(self, bucket: str, key: str, expires_s: int) -> str:
        """A GET link through the external endpoint. A secret: never logged."""
        ...


class PositionalSink(Protocol):
    """A file of known size whose bytes are each written once, at their offset, from several threads at a time."""

    def write_at(self, offset_bytes: int, buffers: Sequence[Buffer]) -> None:
        """Writes the buffers in a row from ``offset_bytes``. Blocking. Raises LtsError, NotEnoughSpaceError."""
        ...

    def checkpoint(self) -> None:
        """Makes everything written so far durable. Blocking."""
        ...

    def commit(self) -> None:
        """Compares the size, syncs, gives the file its final name, syncs the folder. Blocking."""
        ...

    def close(self) -> None:
        """Lets go of the file, leaving what was written for a resume; closing twice is fine. Blocking."""
        ...
