"""Bodies of uploads: sent from the caller's memory in slices, without a copy, under a stall watchdog."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Callable
from typing import Final

import anyio
import anyio.to_thread
from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import Payload

from mover.streams.interfaces import Buffer

__all__ = ["ViewPayload", "content_md5", "md5_base64"]

_SLICE_BYTES: Final = 256 << 10  # what asyncio may have to copy when the socket is full stays small
_INLINE_BYTES: Final = 32 << 10  # hashing less takes less time than going to a thread


class ViewPayload(Payload):
    """A memoryview as an aiohttp payload. botocore takes it for a file of known length and does not touch it.

    aiohttp's read timeout begins after the last byte of a request; until then each slice has ``stall_timeout_s`` to
    leave for the socket.
    """

    def __init__(self, body: Buffer, stall_timeout_s: float, sent: Callable[[int], None]) -> None:
        view = memoryview(body).cast("B")
        super().__init__(view)
        self._view, self._stall_timeout_s, self._sent = view, stall_timeout_s, sent
        self._size = len(view)

    def __len__(self) -> int:
        return len(self._view)

    def read(self, size_bytes: int = -1) -> bytes:
        """Only its presence counts: botocore's validation takes objects with ``read`` for bodies."""
        return bytes(self._view if size_bytes < 0 else self._view[:size_bytes])

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """The text of the body; part of aiohttp's interface."""
        return str(self._view, encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Writes all of it. Raises TimeoutError when the receiver stalls."""
        for start in range(0, len(self._view), _SLICE_BYTES):
            piece = self._view[start : start + _SLICE_BYTES]
            with anyio.fail_after(self._stall_timeout_s):
                await writer.write(piece)
            self._sent(len(piece))


async def content_md5(body: Buffer) -> str:
    """MD5 of a body in base64, as ``Content-MD5`` has it; large ones are hashed in a worker thread."""
    if memoryview(body).nbytes <= _INLINE_BYTES:
        return md5_base64(body)
    return await anyio.to_thread.run_sync(md5_base64, body)


def md5_base64(body: Buffer) -> str:
    """MD5 of a body in base64. Blocking, for small ones."""
    return b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode("ascii")
