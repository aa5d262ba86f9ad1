"""Server-sent events: an id for each, a comment now and then, and an end that the daemon can bring about."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Final

import anyio
import msgspec
from litestar import Request, Response
from litestar.types import ASGIApp, Receive, Scope, Send

from mover.api import JobEvent
from mover.errors import IntakeClosedError, MoverError
from mover.tasks import open_task_group

__all__ = ["HEARTBEAT_S", "EventStream", "Streams", "event_bytes"]

HEARTBEAT_S: Final = 15.0
"""A comment goes out when nothing else has for so long: proxies keep the connection, a lost client is noticed."""

_FIRST_EVENT_S: Final = 1.0  # a stream that is refused is refused with a status; none begins later than this
_LAST_S: Final = 1.0
_SEND_S: Final = 60.0  # a reader that takes nothing for so long is let go
_encode = msgspec.json.Encoder().encode
_HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)


def event_bytes(event: JobEvent) -> bytes:
    """One event as it goes over the wire. JSON holds no line breaks."""
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.number, event.type.encode(), _encode(event))


class Streams:
    """The open streams of an application."""

    def __init__(self, *, heartbeat_s: float = HEARTBEAT_S) -> None:
        self.heartbeat_s = heartbeat_s
        self._open: set[anyio.CancelScope] = set()
        self.closed = False

    def __len__(self) -> int:
        return len(self._open)

    def close(self) -> None:
        """Ends all streams, and refuses those that are asked for from now on."""
        self.closed = True
        self.interrupt()

    def interrupt(self) -> None:
        """Ends all streams; their readers come back with the number of their last event."""
        for scope in self._open:
            scope.cancel()

    def add(self, scope: anyio.CancelScope) -> None:
        """A stream has begun."""
        self._open.add(scope)
        if self.closed:
            scope.cancel()

    def remove(self, scope: anyio.CancelScope) -> None:
        """A stream is over."""
        self._open.discard(scope)


class EventStream(Response[bytes]):
    """Answers with events until they end, the client goes or the streams are closed."""

    def __init__(self, events: AsyncIterator[JobEvent], streams: Streams) -> None:
        super().__init__(b"", media_type="text/event-stream")
        self._events, self._streams = events, streams

    def to_asgi_response(self, app: Any, request: Request[Any, Any, Any], **_: Any) -> ASGIApp:  # type: ignore[override] # noqa: ANN401, ARG002 - as above it
        """The application that answers."""
        return _Answer(self._events, self._streams)


class _Answer:
    def __init__(self, events: AsyncIterator[JobEvent], streams: Streams) -> None:
        self._events, self._streams = events, streams
        self._turn = anyio.Lock()
        self._begun = self._gone = False
        self._sent_s = anyio.current_time()
        self._failure: MoverError | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's
        if self._streams.closed:
            raise IntakeClosedError
        async with open_task_group() as tasks:
            try:
                tasks.start_soon(self._pump, send, tasks.cancel_scope)
                tasks.start_soon(self._beat, send, tasks.cancel_scope)
                while (await receive())["type"] != "http.disconnect":
                    pass
                self._gone = True
                tasks.cancel_scope.cancel()
            finally:
                self._streams.remove(tasks.cancel_scope)
        if self._begun:
            with anyio.move_on_after(_LAST_S):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        elif not self._gone:
            raise self._failure or IntakeClosedError

    async def _pump(self, send: Send, cancel_scope: anyio.CancelScope) -> None:
        try:
            async for event in self._events:
                await self._tell(send, event_bytes(event), cancel_scope)
            if not self._begun:
                await self._nothing_more(send)
        except MoverError as error:
            self._failure = error
        finally:
            if isinstance(self._events, AsyncGenerator):
                with anyio.CancelScope(shield=True):
                    await self._events.aclose()
            cancel_scope.cancel()

    async def _nothing_more(self, send: Send) -> None:
        """Tells a reader that has all events not to come back, as browsers otherwise do."""
        async with self._turn:
            if not self._begun:
                self._begun = True
                await send({"type": "http.response.start", "status": 204, "headers": []})

    async def _beat(self, send: Send, cancel_scope: anyio.CancelScope) -> None:
        """Begins the answer when there is no event yet, and keeps it alive later."""
        await anyio.sleep(_FIRST_EVENT_S)
        await self._tell(send, b"", cancel_scope)
        while True:
            quiet_s = anyio.current_time() - self._sent_s
            if quiet_s >= self._streams.heartbeat_s:
                await self._tell(send, b": here\n\n", cancel_scope)
            else:
                await anyio.sleep(self._streams.heartbeat_s - quiet_s)

    async def _tell(self, send: Send, data: bytes, cancel_scope: anyio.CancelScope) -> None:
        with anyio.move_on_after(_SEND_S) as patience:
            async with self._turn:
                if not self._begun:
                    self._begun = True
                    self._streams.add(cancel_scope)
                    await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
                await send({"type": "http.response.body", "body": data, "more_body": True})
        self._sent_s = anyio.current_time()
        if patience.cancelled_caught:
            cancel_scope.cancel()
