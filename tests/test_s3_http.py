"""Kept connections to an S3 server: none is waited for that may lead nowhere."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from threading import Thread

import pytest

from mover.errors import StallError
from mover.streams.interfaces import ByteRange
from mover.streams.s3_http import HttpRanges


class _SilentLater:
    """Answers ranges until it is told to fall silent on the connections that are open then; new ones work."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.silent: set[int] = set()
        self.open: list[socket.socket] = []
        Thread(target=self._accept, daemon=True).start()

    def fall_silent(self) -> None:
        self.silent |= {connection.fileno() for connection in self.open}

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.open.append(connection)
                Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError):
            while connection.recv(65536):
                if connection.fileno() not in self.silent:
                    head = b'HTTP/1.1 200 OK\r\nETag: "e"\r\nContent-Length: 4\r\n\r\n'
                    connection.sendall(head + b"data")


def test_after_a_stall_no_other_kept_connection_is_waited_for() -> None:
    silent = _SilentLater()
    url = f"http://127.0.0.1:{silent.listener.getsockname()[1]}"
    ranges = HttpRanges(url, "eu-west-1", "user", "password", connect_timeout_s=1, stall_timeout_s=0.5)
    item = ByteRange("bucket", "key", "e", 4, 0, 4)
    kept = [ranges._connection() for _ in range(3)]  # noqa: SLF001 - as three threads would leave them
    for connection in kept:
        connection.connect()
        ranges._keep(connection)  # noqa: SLF001
    until_open = time.monotonic() + 5
    while len(silent.open) < len(kept) and time.monotonic() < until_open:
        time.sleep(0.01)
    silent.fall_silent()
    received: list[bytes] = []
    with pytest.raises(StallError):
        ranges.request(item).receive(memoryview(bytearray(4)), lambda view: received.append(bytes(view)))
    ranges.request(item).receive(memoryview(bytearray(4)), lambda view: received.append(bytes(view)))
    assert received == [b"data"]
    ranges.close()
    silent.listener.close()
