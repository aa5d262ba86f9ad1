"""One pass over a file that writes ranges of it as objects: read in order, checked in order, uploaded side by side.

An object appears only after all of its bytes were checked. Whatever ends the pass, no unfinished upload stays behind.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Protocol

import anyio
import anyio.to_thread
import msgspec

from mover.errors import MoverError
from mover.policies.parts import SINGLE_PUT_BYTES, part_bytes
from mover.streams.interfaces import MultipartUpload, ObjectStore
from mover.streams.pipe import Lanes
from mover.tasks import let_finish, open_task_group

__all__ = ["Check", "FilePiece", "ObjectUpload", "Section", "UploadPass", "pieces_of"]

_PIECES_IN_FLIGHT = 4
_LAST_REQUESTS_S = 20.0  # what a cancelled pass may take to leave nothing behind


class Check(Protocol):
    """What has to be true of an object's bytes before anybody sees them. Blocking."""

    def feed(self, view: memoryview, /) -> None:
        """The next bytes, in order.  Raises IntegrityError."""
        ...

    def finish(self) -> dict[str, str]:
        """Called after the last byte; returns metadata that is known only now.  Raises IntegrityError."""
        ...


class ObjectUpload:
    """One object to be written."""

    def __init__(
        self,
        bucket: str,
        key: str,
        size_bytes: int,
        check: Check,
        metadata: dict[str, str],
        before_it_appears: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Prepares an upload.

        Args:
            bucket: where to.
            key: of the object.
            size_bytes: of the object.
            check: sees every byte.
            metadata: what is known before the first byte. What ``check`` adds is kept only by an object that is
                written in one request: a multipart upload has to name its metadata first.
            before_it_appears: awaited once the bytes are checked.
        """
        self.bucket, self.key, self.size_bytes = bucket, key, size_bytes
        self.check, self.metadata, self.before_it_appears = check, metadata, before_it_appears
        self.part_bytes = part_bytes(size_bytes)
        self.part_count = 1 if size_bytes <= SINGLE_PUT_BYTES else -(-size_bytes // self.part_bytes)
        self.etags: dict[int, str] = {}
        self.upload: MultipartUpload | None = None
        self.beginning = anyio.Lock()


class Section(msgspec.Struct, frozen=True):
    """Bytes ``start`` to ``end`` of a piece are part ``number`` of an object."""

    upload: ObjectUpload
    number: int
    start: int
    end: int


class FilePiece(msgspec.Struct, frozen=True):
    """What is read at a time: a range of the file, and the objects that get parts of it."""

    offset_bytes: int
    size_bytes: int
    sections: tuple[Section, ...]


def pieces_of(upload: ObjectUpload, offset_bytes: int) -> Iterator[FilePiece]:
    """The pieces of an object whose bytes begin at ``offset_bytes`` of the file."""
    for number in range(1, upload.part_count + 1):
        start = (number - 1) * upload.part_bytes
        size_bytes = min(upload.part_bytes, upload.size_bytes - start)
        yield FilePiece(offset_bytes + start, size_bytes, (Section(upload, number, 0, size_bytes),))


class UploadPass:
    """One pass; ``read_bytes`` and ``written_bytes`` say how far it is."""

    def __init__(self, read: Callable[[int, memoryview], Awaitable[None]], store: ObjectStore, lanes: Lanes) -> None:
        """``read`` fills a buffer from an offset of the file."""
        self.read_bytes = self.written_bytes = 0
        self._read, self._store, self._lanes = read, store, lanes
        self._reading = anyio.Lock()
        self._turns = _Turns()
        self._begun = 0
        self._open: list[MultipartUpload] = []

    async def run(self, pieces: Iterator[FilePiece]) -> None:
        """Writes all objects of ``pieces``, which come in the order of their offsets.

        Raises:
            IntegrityError: of a check; that object does not appear.
            MoverError: reading or writing failed.
        """
        try:
            async with open_task_group() as tasks:
                for _ in range(_PIECES_IN_FLIGHT):
                    tasks.start_soon(self._work, pieces)
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(_LAST_REQUESTS_S):
                for upload in self._open:
                    with suppress(MoverError):  # must not hide why the pass ended
                        await self._store.abort(upload)

    async def _work(self, pieces: Iterator[FilePiece]) -> None:
        while True:
            async with AsyncExitStack() as stack:
                async with self._reading:
                    piece = next(pieces, None)
                    if piece is None:
                        return
                    turn, self._begun = self._begun, self._begun + 1
                    view = await stack.enter_async_context(self._lanes.pool.lease(piece.size_bytes))
                    await self._read(piece.offset_bytes, view)
                    self.read_bytes += piece.size_bytes
                async with self._turns.wait_for(turn):
                    found = await anyio.to_thread.run_sync(_check, piece, view, limiter=self._lanes.disk)
                async with open_task_group() as tasks:
                    for section, metadata in zip(piece.sections, found, strict=True):
                        tasks.start_soon(self._put, section, view[section.start : section.end], metadata)

    async def _put(self, section: Section, view: memoryview, found: dict[str, str]) -> None:
        upload = section.upload
        async with self._lanes.requests:
            if upload.part_count == 1:
                if upload.before_it_appears is not None:
                    await upload.before_it_appears()
                await self._store.put(upload.bucket, upload.key, view, upload.metadata | found)
                self.written_bytes += len(view)
                return
            begun = await self._begin(upload)
            upload.etags[section.number] = await self._store.put_part(begun, section.number, view)
        self.written_bytes += len(view)
        if len(upload.etags) == upload.part_count:  # all were checked: a part is sent after its turn
            if upload.before_it_appears is not None:
                await upload.before_it_appears()
            await self._store.complete(begun, [upload.etags[number] for number in sorted(upload.etags)])
            self._open.remove(begun)

    async def _begin(self, upload: ObjectUpload) -> MultipartUpload:
        async def begin() -> None:
            upload.upload = await self._store.begin(upload.bucket, upload.key, upload.metadata)
            self._open.append(upload.upload)

        async with upload.beginning:
            if upload.upload is None:
                # cut off, the request could leave an upload that nobody knows
                await let_finish(begin, _LAST_REQUESTS_S)
        while upload.upload is None:
            await anyio.sleep_forever()  # raises: it was cancelled
        return upload.upload


class _Turns:
    """Lets tasks through in the order of their numbers, which begin at 0."""

    def __init__(self) -> None:
        self._next = 0
        self._waiting: dict[int, anyio.Event] = {}

    @asynccontextmanager
    async def wait_for(self, number: int) -> AsyncIterator[None]:
        """Waits until every lower number is done; this one is done with the block, unless that fails."""
        if number != self._next:
            self._waiting[number] = anyio.Event()
            await self._waiting[number].wait()
        yield
        self._next = number + 1
        following = self._waiting.pop(self._next, None)
        if following is not None:
            following.set()


def _check(piece: FilePiece, view: memoryview) -> list[dict[str, str]]:
    found = []
    for section in piece.sections:
        upload = section.upload
        upload.check.feed(view[section.start : section.end])
        found.append(upload.check.finish() if section.number == upload.part_count else {})
    return found
