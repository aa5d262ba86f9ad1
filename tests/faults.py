"""A real HTTP proxy that damages what passes: for tests of everything that talks to a server.

    async with FaultProxy("http://127.0.0.1:9000") as proxy:
        proxy.rules.append(Rule(Answer(503, "SlowDown"), method="PUT", times=2))
        ...  # talk to proxy.url
        assert [item.fault for item in proxy.seen] == ["Answer", "Answer", ""]

The first rule that matches a request and has firings left is applied to it; requests without a rule pass unharmed.
``seen`` has every request that came, ``served`` those whose reply went to the client whole; ``wait_until`` waits for
what a test needs of them.
``Host`` is kept, so that signatures hold. Requests need a Content-Length (or no body).
"""

from __future__ import annotations

import math
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import anyio
from anyio.abc import ByteStream, SocketAttribute, SocketListener
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.tls import TLSListener

__all__ = [
    "AlterReply",
    "AlterRequest",
    "Answer",
    "CorruptReply",
    "CorruptRequest",
    "CutReply",
    "CutRequest",
    "FaultProxy",
    "LoseReply",
    "Rule",
    "Seen",
    "StallReply",
    "StallRequest",
    "TrickleReply",
]

_HEAD_BYTES = 64 << 10
_PIECE_BYTES = 64 << 10
_XML = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{}</Code><Message>made up by a test</Message></Error>'
_BROKEN = (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream, anyio.IncompleteRead, OSError)


@dataclass(frozen=True)
class Answer:
    """The server is not asked: the proxy answers, with an S3 error document of ``code`` unless ``body`` is given."""

    status: int
    code: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None


@dataclass(frozen=True)
class CutRequest:
    """The connection dies when ``after_bytes`` of the request's body have come; the server saw no more."""

    after_bytes: int = 0


@dataclass(frozen=True)
class StallRequest:
    """The proxy stops reading when ``after_bytes`` of the request's body have come, and says nothing."""

    after_bytes: int = 0


@dataclass(frozen=True)
class CorruptRequest:
    """One bit of the request's body is flipped on its way to the server."""

    at_byte: int = 0


@dataclass(frozen=True)
class LoseReply:
    """The server does the work, the client sees the connection die."""


@dataclass(frozen=True)
class CutReply:
    """The connection dies when ``after_bytes`` of the reply's body have gone to the client."""

    after_bytes: int = 0


@dataclass(frozen=True)
class StallReply:
    """Nothing more comes after ``after_bytes`` of the reply's body; the connection stays open."""

    after_bytes: int = 0


@dataclass(frozen=True)
class CorruptReply:
    """One bit of the reply's body is flipped on its way to the client."""

    at_byte: int = 0


@dataclass(frozen=True)
class AlterReply:
    """Headers of the reply are taken out and put in; names in lower case."""

    remove: tuple[str, ...] = ()
    add: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class AlterRequest:
    """Headers of the request are taken out; names in lower case. For servers that do not check signatures."""

    remove: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrickleReply:
    """The reply's body comes in ``pieces`` pieces of the same length, each after a pause."""

    pieces: int
    pause_s: float


Fault = (
    Answer
    | CutRequest
    | StallRequest
    | CorruptRequest
    | LoseReply
    | CutReply
    | StallReply
    | CorruptReply
    | AlterReply
    | AlterRequest
    | TrickleReply
)


@dataclass
class Rule:
    """A fault for requests of a method (any when empty) whose target contains ``target``, at most ``times`` times."""

    fault: Fault
    method: str = ""
    target: str = ""
    times: float = 1  # math.inf: always

    def matches(self, head: Head) -> bool:
        """Whether it is this rule's turn."""
        method, target, _ = head.start.split(" ", 2)
        return self.times > 0 and self.method in {"", method} and self.target in target


@dataclass(frozen=True)
class Seen:
    """A request that came, and the name of the fault that it met ('' when none)."""

    method: str
    target: str
    fault: str
    headers: dict[str, str] = field(default_factory=dict, repr=False)


@dataclass
class Head:
    """A start line and the headers of one message."""

    start: str
    headers: list[tuple[str, str]]

    @classmethod
    def parse(cls, raw: bytes) -> Head:
        start, *lines = raw.decode("latin-1").split("\r\n")
        return cls(start, [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)])

    def get(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name), None)

    def drop(self, *names: str) -> None:
        self.headers = [(key, value) for key, value in self.headers if key.lower() not in names]

    def encode(self) -> bytes:
        lines = (f"{name}: {value}\r\n" for name, value in self.headers)
        return f"{self.start}\r\n{''.join(lines)}\r\n".encode("latin-1")


class FaultProxy:
    """Listens on a port of the loopback interface as long as its context is open."""

    def __init__(self, upstream_url: str, tls: ssl.SSLContext | None = None) -> None:
        """``tls``: clients speak TLS to the proxy, which speaks plain HTTP to the server."""
        parts = urlsplit(upstream_url)
        self._host, self._port, self._tls = parts.hostname or "", parts.port or 80, tls
        self._stack = AsyncExitStack()
        self.rules: list[Rule] = []
        self.seen: list[Seen] = []
        self.served: list[Seen] = []
        self.connections = 0
        self.url = ""
        self._news = anyio.Event()

    async def __aenter__(self) -> Self:
        listener = await self._stack.enter_async_context(_listening())
        tasks = await self._stack.enter_async_context(anyio.create_task_group())
        self._stack.callback(tasks.cancel_scope.cancel)
        scheme = "http" if self._tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{listener.extra_attributes[SocketAttribute.local_port]()}"
        if self._tls is None:
            tasks.start_soon(listener.serve, self._serve)
        else:
            tasks.start_soon(TLSListener(listener, self._tls, standard_compatible=False).serve, self._serve)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, exc, trace)

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Returns as soon as ``condition`` holds; it is asked again whenever a request came or was served."""
        while not condition():
            await self._news.wait()

    def _tell(self) -> None:
        news, self._news = self._news, anyio.Event()
        news.set()

    async def _serve(self, client: ByteStream) -> None:
        self.connections += 1
        async with client:
            incoming = BufferedByteReceiveStream(client)
            try:
                while await self._exchange(client, incoming):
                    pass
            except _BROKEN:
                return

    async def _exchange(self, client: ByteStream, incoming: BufferedByteReceiveStream) -> bool:
        """One request and its reply; whether the connection lives on."""
        head = Head.parse(await incoming.receive_until(b"\r\n\r\n", _HEAD_BYTES))
        method, target, _ = head.start.split(" ", 2)
        rule = next((rule for rule in self.rules if rule.matches(head)), None)
        fault = rule.fault if rule else None
        if rule:
            rule.times -= 1
        headers = {name.lower(): value for name, value in head.headers}
        seen = Seen(method, target, type(fault).__name__ if fault else "", headers)
        self.seen.append(seen)
        self._tell()
        length = int(head.get("content-length") or 0)
        if isinstance(fault, Answer):
            async for _ in _pieces(incoming, length):
                pass
            await client.send(_answer(fault, with_body=method != "HEAD"))
            return True
        async with await anyio.connect_tcp(self._host, self._port) as server:
            head.drop("connection", *(fault.remove if isinstance(fault, AlterRequest) else ()))
            head.headers.append(("Connection", "close"))
            await server.send(head.encode())
            if not await _forward_request(incoming, server, length, fault):
                return False
            alive = await _forward_reply(server, client, fault, bodyless=method == "HEAD")
        if alive:
            self.served.append(seen)
            self._tell()
        return alive


@asynccontextmanager
async def _listening() -> AsyncIterator[SocketListener]:
    listeners = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listeners:
        yield listeners.listeners[0]  # type: ignore[misc]


async def _pieces(source: BufferedByteReceiveStream, length: float) -> AsyncIterator[bytes]:
    """The next ``length`` bytes; all until the end of the stream when it is infinite."""
    while length > 0:
        try:
            piece = await source.receive(int(min(length, _PIECE_BYTES)))
        except anyio.EndOfStream:
            if math.isinf(length):
                return
            raise
        length -= len(piece)
        yield piece


async def _forward_request(
    source: BufferedByteReceiveStream, server: ByteStream, length: int, fault: Fault | None
) -> bool:
    flipped = fault.at_byte if isinstance(fault, CorruptRequest) else None
    limit = fault.after_bytes if isinstance(fault, CutRequest | StallRequest) else math.inf
    done = 0
    if limit <= 0:
        return await _end(fault)
    async for piece in _pieces(source, length):
        await server.send(_flip(piece, done, flipped))
        done += len(piece)
        if done >= limit:
            return await _end(fault)
    return True


async def _forward_reply(server: ByteStream, client: ByteStream, fault: Fault | None, *, bodyless: bool) -> bool:
    outgoing = BufferedByteReceiveStream(server)
    head = Head.parse(await outgoing.receive_until(b"\r\n\r\n", _HEAD_BYTES))
    bodyless = bodyless or head.start.split(" ", 2)[1] in {"204", "304"}
    length = 0 if bodyless else float(head.get("content-length") or math.inf)
    if not math.isinf(length):
        head.drop("connection")
    if isinstance(fault, LoseReply):
        async for _ in _pieces(outgoing, length):
            pass
        return False
    if isinstance(fault, AlterReply):
        head.drop(*fault.remove)
        head.headers += fault.add
    await client.send(head.encode())
    flipped = fault.at_byte if isinstance(fault, CorruptReply) else None
    limit = fault.after_bytes if isinstance(fault, CutReply | StallReply) else math.inf
    done = 0
    if isinstance(fault, TrickleReply):
        await _trickle(b"".join([piece async for piece in _pieces(outgoing, length)]), client, fault)
        return True
    async for piece in _pieces(outgoing, length):
        kept = piece[: int(min(len(piece), limit - done))]
        if kept:
            await client.send(_flip(kept, done, flipped))
        done += len(kept)
        if done >= limit:
            return await _end(fault)
    return not math.isinf(length)


async def _trickle(body: bytes, client: ByteStream, fault: TrickleReply) -> None:
    size_bytes = -(-len(body) // fault.pieces)
    for start in range(0, len(body), size_bytes):
        await anyio.sleep(fault.pause_s)
        await client.send(body[start : start + size_bytes])


async def _end(fault: Fault | None) -> bool:
    """Cuts, or waits until the proxy is closed."""
    if isinstance(fault, StallReply | StallRequest):
        await anyio.sleep_forever()
    return False


def _flip(piece: bytes, start: int, at_byte: int | None) -> bytes:
    if at_byte is None or not start <= at_byte < start + len(piece):
        return piece
    changed = bytearray(piece)
    changed[at_byte - start] ^= 1
    return bytes(changed)


def _answer(fault: Answer, *, with_body: bool) -> bytes:
    body = (_XML.format(fault.code).encode() if fault.body is None else fault.body) if with_body else b""
    headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body))), *fault.headers]
    return Head(f"HTTP/1.1 {fault.status} Made Up", headers).encode() + body
