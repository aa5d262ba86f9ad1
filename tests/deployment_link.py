"""A slow link to an S3 server, in a container between flow runs and the server: ``deployment_link.py HOST PORT``.

Needs nothing but anyio, so that the deployment's own image runs it. It is steered by files in ``/control``:
``rules.json`` is read again whenever it changes; every request is a line of ``seen.jsonl`` before it is passed on.
A reply of a MiB and more takes ``reply_s`` seconds. One that ``held`` names (a part of ``GET /bucket/key bytes=0-9``)
comes at a KiB a second until it is held no more. ``Host`` is kept, so that signatures hold.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import anyio
from anyio.abc import ByteStream
from anyio.streams.buffered import BufferedByteReceiveStream

__all__ = ["CONTROL", "Link"]

CONTROL: Final = Path("/control")
_PORT: Final = 9000
_HEAD_BYTES: Final = 64 << 10
_PIECE_BYTES: Final = 64 << 10
_SLOW_BYTES: Final = 1 << 20
_DRIP_BYTES: Final = 1 << 10
_DRIP_S: Final = 1.0
_LOOK_S: Final = 0.05
_BROKEN: Final = (
    anyio.BrokenResourceError,
    anyio.ClosedResourceError,
    anyio.EndOfStream,
    anyio.IncompleteRead,
    OSError,
)


class Link:
    """Serves until it is killed."""

    def __init__(self, host: str, port: int, control: Path) -> None:
        self._host, self._port, self._control = host, port, control
        self._rules: dict[str, Any] = {"held": [], "reply_s": 0.0}
        self._changed = 0

    async def serve(self) -> None:
        """Listens on all addresses."""
        listener = await anyio.create_tcp_listener(local_host="0.0.0.0", local_port=_PORT)  # noqa: S104 - in a container
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._follow_rules)
            await listener.serve(self._client)

    async def _follow_rules(self) -> None:
        path = self._control / "rules.json"
        while True:
            changed = path.stat().st_mtime_ns
            if changed != self._changed:
                self._rules, self._changed = json.loads(path.read_text(encoding="utf-8")), changed
            await anyio.sleep(_LOOK_S)

    def _is_held(self, what: str) -> bool:
        return any(part in what for part in self._rules["held"])

    async def _client(self, client: ByteStream) -> None:
        async with client:
            incoming = BufferedByteReceiveStream(client)
            try:
                while await self._exchange(client, incoming):
                    pass
            except _BROKEN:
                return

    async def _exchange(self, client: ByteStream, incoming: BufferedByteReceiveStream) -> bool:
        """One request and its reply; whether the connection lives on."""
        start, headers = _parse(await incoming.receive_until(b"\r\n\r\n", _HEAD_BYTES))
        method, target, _ = start.split(" ", 2)
        what = f"{method} {unquote(target.partition('?')[0])} {headers.get('range', '')}"
        seen = {"at_s": time.time(), "what": what}
        with (self._control / "seen.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(seen) + "\n")
        async with await anyio.connect_tcp(self._host, self._port) as server:
            await server.send(_encode(start, {**headers, "connection": "close"}))
            await self._copy(incoming, server, int(headers.get("content-length", "0")), "")
            outgoing = BufferedByteReceiveStream(server)
            answer, given = _parse(await outgoing.receive_until(b"\r\n\r\n", _HEAD_BYTES))
            bodyless = method == "HEAD" or answer.split(" ", 2)[1] in {"204", "304"}
            length = int(given.get("content-length", "-1"))
            known = bodyless or length >= 0
            await client.send(_encode(answer, {**given, "connection": "keep-alive" if known else "close"}))
            if not bodyless:
                await self._copy(outgoing, client, length, what)
            return known

    async def _copy(self, source: BufferedByteReceiveStream, target: ByteStream, length: int, what: str) -> None:
        """Passes ``length`` bytes on, all there are when it is negative; those of a reply as the rules say."""
        if length > 0 and self._is_held(what):
            # Taken from the server at once: it closes a connection that nobody reads from.
            length -= await self._drip(await source.receive_exactly(length), target, what)
        left = length
        while left:
            try:
                piece = await source.receive(min(left, _PIECE_BYTES) if left > 0 else _PIECE_BYTES)
            except anyio.EndOfStream:
                if left < 0:
                    return
                raise
            left -= len(piece) if left > 0 else 0
            await target.send(piece)
            if length >= _SLOW_BYTES:
                await anyio.sleep(self._rules["reply_s"] * len(piece) / length)

    async def _drip(self, body: bytes, target: ByteStream, what: str) -> int:
        """Sends a held body, all that is left at once when it is let go; returns its length."""
        sent = 0
        while sent < len(body) and self._is_held(what):
            await target.send(body[sent : sent + _DRIP_BYTES])
            sent += _DRIP_BYTES
            until = anyio.current_time() + _DRIP_S
            while anyio.current_time() < until and self._is_held(what):  # noqa: ASYNC110 - a file says so
                await anyio.sleep(_LOOK_S)
        await target.send(body[sent:])
        return len(body)


def _parse(raw: bytes) -> tuple[str, dict[str, str]]:
    """Start line, and headers by their names in lower case."""
    start, *lines = raw.decode("latin-1").split("\r\n")
    return start, {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _encode(start: str, headers: dict[str, str]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{start}\r\n{lines}\r\n".encode("latin-1")


if __name__ == "__main__":
    anyio.run(Link(sys.argv[1], int(sys.argv[2]), CONTROL).serve)
