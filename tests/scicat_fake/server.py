"""Runs the server on a socket: in a thread for tests, or in the foreground for a deployment."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from asyncio import Transport
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tests.scicat_fake.app import TRANSPORT, ScicatApp
from tests.scicat_fake.control import Control
from tests.scicat_fake.state import ADMIN, CREATE_DATASET, CREATE_JOB, DELETE, Account, State

__all__ = ["PASSWORD", "USER", "ScicatServer", "fresh_state", "listening_socket", "make_server", "running_server"]

USER, PASSWORD = "archiveManager", "archive-manager-password"
INGESTOR = "ingestor"
_START_TIMEOUT_S = 10.0


class ScicatServer:
    """A running server: where it is, an account that may do everything, and the controls."""

    def __init__(self, url: str, app: ScicatApp) -> None:
        self.url = url
        self.user = USER
        self.password = PASSWORD
        self.control = Control(app)


class _Protocol(H11Protocol):
    """Gives the application the connection, so that it can be cut without an answer."""

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        inner: Callable[..., Any] = self.app

        async def with_transport(scope: Scope, receive: Receive, send: Send) -> None:
            await inner({**scope, TRANSPORT: transport}, receive, send)

        self.app = with_transport


def fresh_state(user: str = USER, password: str = PASSWORD) -> State:
    """An empty catalogue with the archive's account and the Ingestor's."""
    state = State()
    state.accounts[user] = Account(user, password, {ADMIN, DELETE}, {"archivemanager"})
    state.accounts[INGESTOR] = Account(INGESTOR, INGESTOR, {CREATE_DATASET, CREATE_JOB}, {"ingestor", "p12345"})
    return state


def listening_socket(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(
        family, socket.SOCK_STREAM, socket.IPPROTO_TCP
    )  # asyncio sets TCP_NODELAY only where TCP is named
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((host, port))
    return bound


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ends in order: the original raises the signal again, which kills the process before it has saved."""
        with suppress(NotImplementedError, RuntimeError, ValueError):  # not in the main thread: no signals
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, self.handle_exit, number, None)
        yield


def make_server(app: ScicatApp) -> uvicorn.Server:
    return _Server(
        uvicorn.Config(
            app,
            http=_Protocol,
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
    )


@contextmanager
def running_server(make_state: Callable[[], State] = fresh_state) -> Iterator[ScicatServer]:
    """A server on a free port of loopback, in a thread, until the end of the block."""
    app = ScicatApp(make_state)
    server = make_server(app)
    with listening_socket("127.0.0.1", 0) as bound:
        thread = threading.Thread(target=_serve, args=(server, bound), name="scicat-fake", daemon=True)
        thread.start()
        try:
            _wait_for_start(server, thread)
            yield ScicatServer(f"http://127.0.0.1:{bound.getsockname()[1]}", app)
        finally:
            app.reset()  # lets held requests go
            server.should_exit = True
            thread.join(_START_TIMEOUT_S)


def _serve(server: uvicorn.Server, bound: socket.socket) -> None:
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        runner.run(server.serve([bound]))


def _wait_for_start(server: uvicorn.Server, thread: threading.Thread) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.002)
