"""Signed, pinned GETs over plain sockets: a body is received straight into the caller's buffer, in the caller's thread.

Blocking throughout. The stall watchdog is the socket's own timeout: it starts again with every byte that arrives.
"""

from __future__ import annotations

import re
import socket
import ssl
import struct
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from threading import Lock
from urllib.parse import quote, urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from mover.errors import (
    MoverError,
    ObjectAccessError,
    ObjectChangedError,
    ObjectTransientError,
    ShortReadError,
    StallError,
)
from mover.streams.interfaces import ByteRange, Consumer
from mover.streams.s3_errors import error_from_reply

__all__ = ["HttpRanges", "RangeRequest"]

_OP = "GET"
_ERROR_BODY_BYTES = 4096
_CODE = re.compile(rb"<Code>([A-Za-z0-9]{1,64})</Code>")
_CODES = {404: "NoSuchKey"}  # for servers that answer without a body
_GOOD = (200, 206)


class HttpRanges:
    """Connections to one S3 endpoint, kept open between requests. Safe to use from several threads."""

    def __init__(
        self,
        endpoint_url: str,
        region: str,
        access_key: str,
        secret_key: str,
        *,
        connect_timeout_s: float,
        stall_timeout_s: float,
    ) -> None:
        parts = urlsplit(endpoint_url)
        self._host, self._port, self._secure = parts.hostname or "", parts.port, parts.scheme == "https"
        self._base_url = f"{parts.scheme}://{parts.netloc}"
        self._signer = S3SigV4Auth(Credentials(access_key, secret_key), "s3", region)
        self._tls = ssl.create_default_context() if self._secure else None
        self._connect_timeout_s, self._stall_timeout_s = connect_timeout_s, stall_timeout_s
        self._idle: list[HTTPConnection] = []
        self._lock = Lock()

    def request(self, item: ByteRange) -> RangeRequest:
        """One attempt to receive ``item``."""
        return RangeRequest(self, item)

    def close(self) -> None:
        """Closes the idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _connection(self) -> HTTPConnection:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        if self._tls is not None:
            return HTTPSConnection(self._host, self._port, timeout=self._connect_timeout_s, context=self._tls)
        return HTTPConnection(self._host, self._port, timeout=self._connect_timeout_s)

    def _keep(self, connection: HTTPConnection) -> None:
        with self._lock:
            self._idle.append(connection)

    def _headers(self, item: ByteRange) -> tuple[str, dict[str, str]]:
        target = f"/{quote(item.bucket)}/{quote(item.key, safe='/~')}"
        headers = {"If-Match": f'"{item.etag}"', "Accept-Encoding": "identity"}
        if item.size_bytes != item.object_bytes:
            headers["Range"] = f"bytes={item.start}-{item.end - 1}"
        request = AWSRequest(method="GET", url=self._base_url + target, headers=headers)
        self._signer.add_auth(request)
        return target, dict(request.headers.items())

    def _open(self, request: RangeRequest, item: ByteRange) -> tuple[HTTPConnection, socket.socket, HTTPResponse]:
        """Sends the request; a kept connection that the server closed meanwhile is replaced once, silently.

        The socket is returned, too: the connection forgets it when the reply says that no other one will follow.
        """
        target, headers = self._headers(item)
        for kept in (True, False):
            connection = self._connection()
            fresh = connection.sock is None
            try:
                if fresh:
                    connection.connect()
                raw = connection.sock
                request.connected(raw)
                raw.settimeout(self._stall_timeout_s)
                connection.request("GET", target, headers=headers)
                return connection, raw, connection.getresponse()
            except TimeoutError:
                connection.close()
                raise
            except (HTTPException, OSError):
                connection.close()
                if fresh or not kept:
                    raise
        raise AssertionError  # the loop returns or raises


class RangeRequest:
    """One attempt; ``abort`` may be called from another thread at any time and makes ``receive`` fail at once."""

    def __init__(self, ranges: HttpRanges, item: ByteRange) -> None:
        self._ranges, self._item = ranges, item
        self._socket: socket.socket | None = None
        self._aborted = False
        self._lock = Lock()

    def abort(self) -> None:
        """Shuts the connection down."""
        with self._lock:
            self._aborted = True
            if self._socket is not None:
                _shut(self._socket)

    def connected(self, raw: socket.socket) -> None:
        """Remembers the connection's socket for ``abort``."""
        with self._lock:
            self._socket = raw
            if self._aborted:
                _shut(raw)

    def receive(self, buffer: memoryview, consume: Consumer) -> None:
        """Receives the whole range through ``buffer``. Blocking. Raises as ``ObjectReader``."""
        item, ranges = self._item, self._ranges
        try:
            connection, raw, response = ranges._open(self, item)  # noqa: SLF001 - two halves of one thing
            done = False
            try:
                _check(response, item)
                _receive(raw, response, item, buffer, consume, ranges._stall_timeout_s)  # noqa: SLF001
                done = not response.will_close
            finally:
                with self._lock:
                    self._socket = None
                if done and response.isclosed():
                    ranges._keep(connection)  # noqa: SLF001
                else:
                    response.close()
                    connection.close()
        except ssl.SSLCertVerificationError as exc:
            raise ObjectAccessError(_OP, item.location, str(exc)) from exc
        except (TimeoutError, BlockingIOError) as exc:  # the second: SO_RCVTIMEO ran out
            ranges.close()  # the others lead the same way: each would cost another stall
            raise StallError(_OP, item.location, ranges._stall_timeout_s) from exc  # noqa: SLF001
        except (HTTPException, OSError) as exc:
            raise ObjectTransientError(_OP, item.location, str(exc) or type(exc).__name__) from exc


def _watch_for_stalls(connection: socket.socket, stall_timeout_s: float) -> None:
    """Lets the kernel wait for bytes, at most so long: a timeout of Python's would wake up for every packet.

    Only for the body: Python's buffered reader takes a wait of the kernel that runs out for the end of the stream.
    """
    if isinstance(connection, ssl.SSLSocket):
        return
    connection.settimeout(None)
    seconds, fraction = divmod(stall_timeout_s, 1)
    timeval = struct.pack("@ll", int(seconds), int(fraction * 1_000_000))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):  # closed already
        # Wakes a thread that waits for bytes. Not SSLSocket's own: that thread would read on without decrypting.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _receive(
    connection: socket.socket,
    response: HTTPResponse,
    item: ByteRange,
    buffer: memoryview,
    consume: Consumer,
    stall_timeout_s: float,
) -> None:
    """Fills ``buffer`` again and again, with one system call for each filling where the socket allows it."""
    flags = 0 if isinstance(connection, ssl.SSLSocket) else socket.MSG_WAITALL
    remaining = item.size_bytes
    # What came along with the headers. After this the library's own buffer is empty, and the socket is read directly.
    ahead = response.fp.read1(min(remaining, len(buffer))) if remaining else b""
    buffer[: len(ahead)] = ahead
    filled = len(ahead)
    _watch_for_stalls(connection, stall_timeout_s)
    while remaining:
        view = buffer[: min(len(buffer), remaining)]
        filled, failure = _fill(connection, view, filled, flags)
        if filled:
            consume(view[:filled])  # also what came before a failure: the next attempt goes on after it
        remaining -= filled
        if failure is not None:
            raise failure
        if filled < len(view):
            raise ShortReadError(_OP, item.location, item.size_bytes, item.size_bytes - remaining)
        filled = 0
    response.length = 0
    response.read()  # tells the library that the body ended, so that the connection can be used again


def _fill(connection: socket.socket, view: memoryview, filled: int, flags: int) -> tuple[int, OSError | None]:
    """Bytes in ``view`` after filling it, and what stopped that; fewer without a failure: the sender closed."""
    while filled < len(view):
        try:
            received = connection.recv_into(view[filled:], 0, flags)
        except OSError as exc:
            return filled, exc
        if not received:
            break
        filled += received
    return filled, None


def _check(response: HTTPResponse, item: ByteRange) -> None:
    """Compares status, ETag, length and Content-Range with what was asked for."""
    if response.status not in _GOOD:
        raise _failure(response, item)
    etag = (response.getheader("ETag") or "").strip('"')
    if etag != item.etag:  # a reply without one proves nothing
        raise ObjectChangedError(_OP, item.location, "ETag", item.etag, etag)
    partial = item.size_bytes != item.object_bytes
    if partial:
        expected = f"bytes {item.start}-{item.end - 1}/{item.object_bytes}"
        found = response.getheader("Content-Range")
        if response.status != 206 or found != expected:
            _refuse_range(item, response.status, expected, found)
    length = response.getheader("Content-Length")
    if length != str(item.size_bytes):
        if not partial and length is not None and length.isdecimal():
            raise ObjectChangedError(_OP, item.location, "size", item.object_bytes, int(length))
        raise ObjectTransientError(_OP, item.location, f"Content-Length {length}, expected {item.size_bytes}")


def _refuse_range(item: ByteRange, status: int, expected: str, found: str | None) -> None:
    total = (found or "").rpartition("/")[2]
    if total.isdigit() and int(total) != item.object_bytes:
        raise ObjectChangedError(_OP, item.location, "size", item.object_bytes, int(total))
    raise ObjectAccessError(_OP, item.location, f"status {status}, Content-Range {found!r}, asked for {expected!r}")


def _failure(response: HTTPResponse, item: ByteRange) -> MoverError:
    body = response.read(_ERROR_BODY_BYTES)
    match = _CODE.search(body)
    code = match[1].decode() if match else _CODES.get(response.status, "")
    if response.status == 412:
        return ObjectChangedError(_OP, item.location, "ETag", item.etag, "another one")
    if response.status == 416:
        return ObjectChangedError(_OP, item.location, "size", item.object_bytes, "a smaller one")
    headers = {name.lower(): value for name, value in response.getheaders()}
    return error_from_reply(_OP, item.location, response.status, code, response.reason, headers)
