"""Asks a daemon how it is, on this host with the standard library alone: health checks run every few seconds."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

from mover.errors import ConfigError

__all__ = ["ask"]

_ANSWER_BYTES = 1 << 20


def ask(
    url: str, config: Path | None, assignments: tuple[str, ...], *, ready: bool, json: bool, timeout_s: float
) -> int:
    """Prints what the daemon says of itself; 0: it is well, 1: it is not, or does not answer, 2: nobody knows where.

    ``url``: of the daemon; '' is that of MOVER_URL, else this host's own.
    """
    path = "/readyz" if ready else "/livez"
    accept = "application/json" if json or not ready else "text/plain"
    url = url or os.environ.get("MOVER_URL", "")
    try:
        if _is_proxied(url):
            from mover.api_health import get_text

            status, body = get_text(url.rstrip("/") + path, accept=accept, timeout_s=timeout_s)
        else:
            status, body = _get(_where(url, config, assignments), path, accept, timeout_s)
    except ConfigError as error:
        print(f"mover: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except (OSError, ValueError) as error:
        print(f"mover: no answer from the daemon: {error}", file=sys.stderr)  # noqa: T201
        return 1
    sys.stdout.write(body.rstrip("\n") + "\n")
    return 0 if status == 200 else 1


def _is_proxied(url: str) -> bool:
    """Whether it is the address of a reverse proxy: TLS, or a path before the daemon's own."""
    parts = urlsplit(url)
    return bool(parts.hostname) and (
        parts.scheme == "https" or (parts.scheme == "http" and parts.path.strip("/") != "")
    )


def _where(url: str, config: Path | None, assignments: tuple[str, ...]) -> tuple[str, int]:
    """Host and port, or path and 0.  Raises ConfigError."""
    if url:
        path = url.removeprefix("unix:")
        if path != url and path.startswith("/"):
            return "/" + path.lstrip("/"), 0
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname:
            return parts.hostname, parts.port or 80
        raise ConfigError("MOVER_URL", url.rpartition("@")[2], "http(s)://host:port or unix:/path")
    from mover.settings import load_settings

    options: dict[str, object] = {}
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        options[name] = value
    settings = load_settings(options, config=config)
    if settings.mover_socket is not None:
        return str(settings.mover_socket), 0
    every = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - as a listening address is asked for
    host = settings.mover_host.strip("[]")
    return every.get(host, host), settings.mover_port


def _get(where: tuple[str, int], path: str, accept: str, timeout_s: float) -> tuple[int, str]:
    """Status and body.  Raises OSError, and ValueError for what is no HTTP."""
    host, port = where
    if port:
        connection = socket.create_connection((host, port), timeout=timeout_s)
    else:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout_s)
        connection.connect(host)
    with connection:
        request = f"GET {path} HTTP/1.0\r\nHost: localhost\r\nAccept: {accept}\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode())
        answer = b""
        while (piece := connection.recv(65536)) and len(answer) < _ANSWER_BYTES:
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    status = int(words[1]) if words[0].startswith(b"HTTP/") and words[1:] else 0
    return status, body.decode("utf-8", "replace")
