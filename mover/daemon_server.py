"""Listening: sockets that are bound before anything else is begun, and the HTTP server on them."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from mover.daemon_connections import PatientProtocol
from mover.errors import ConfigError, ListenError

if TYPE_CHECKING:
    from litestar.types import ASGIApp

__all__ = ["DaemonServer", "check_address", "listen"]

_BACKLOG = 2048
_LAST_REQUESTS_S = 5
_KEEP_ALIVE_S = 30
_SOCKET_MODE = 0o660
_NEEDS_TOKENS = "an address of this host alone (127.0.0.1, ::1, localhost); beyond it MOVER_TOKEN_FILE is required"


def check_address(host: str, token_file: Path | None) -> None:
    """Refuses to let anybody in from elsewhere without tokens.  Raises ConfigError."""
    if token_file is None and not _is_loopback(host):
        raise ConfigError("MOVER_HOST", host, _NEEDS_TOKENS)


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"


@contextmanager
def listen(host: str, port: int, path: Path | None) -> Iterator[list[socket.socket]]:
    """Sockets that are bound and listen until the block ends: TCP, and a Unix socket if ``path`` is given.

    ``host`` 'localhost' is all of its addresses. The Unix socket is for the daemon's user and group.

    Raises:
        ListenError: an address is in use, or not this host's.
    """
    sockets: list[socket.socket] = []
    ours: tuple[int, int] | None = None
    try:
        sockets += _tcp(host.strip("[]"), port)
        if path is not None:
            sockets.append(_unix(path))
            ours = _identity(path)
        yield sockets
    finally:
        for item in sockets:
            item.close()
        if path is not None and ours is not None and _identity(path) == ours:  # not the next daemon's
            path.unlink(missing_ok=True)


def _tcp(host: str, port: int) -> list[socket.socket]:
    where = f"{host}:{port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ListenError(where, error.strerror or str(error)) from error
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        item = socket.socket(family, kind, protocol)
        try:
            item.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                item.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            item.bind(address)
            item.listen(_BACKLOG)
        except OSError as error:
            item.close()
            failure = error
            if error.errno == errno.EADDRNOTAVAIL:  # localhost has an address that this host lacks
                continue
            break
        item.setblocking(False)  # noqa: FBT003 - the standard library's signature
        sockets.append(item)
        failure = None
    if failure is not None or not sockets:
        for item in sockets:
            item.close()
        raise ListenError(where, (failure and failure.strerror) or "no address") from failure
    return sockets


def _unix(path: Path) -> socket.socket:
    item = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        before = os.umask(0o777 & ~_SOCKET_MODE)  # nobody else gets in while it has no mode yet
        try:
            item.bind(str(path))
        finally:
            os.umask(before)
        path.chmod(_SOCKET_MODE)
        item.listen(_BACKLOG)
        item.setblocking(False)  # noqa: FBT003 - as above
    except OSError as error:
        item.close()
        raise ListenError(str(path), error.strerror or str(error)) from error
    except ListenError:
        item.close()
        raise
    return item


def _identity(path: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        status = path.lstat()
        return status.st_dev, status.st_ino
    return None


def _remove_stale(path: Path) -> None:
    """Removes the socket of a daemon that was killed.  Raises ListenError when somebody answers there."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ListenError(str(path), "something else than a socket is there")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        try:
            caller.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        else:
            raise ListenError(str(path), "another program listens there")


class DaemonServer(uvicorn.Server):
    """uvicorn without its handling of signals, which is the daemon's."""

    def __init__(self, app: ASGIApp) -> None:
        config = uvicorn.Config(
            app,
            http=PatientProtocol,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            lifespan="on",
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_LAST_REQUESTS_S,
        )
        super().__init__(config)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signals alone."""
        yield

    def stop(self) -> None:
        """Takes no more connections, and ends once the last requests are answered."""
        self.should_exit = True
