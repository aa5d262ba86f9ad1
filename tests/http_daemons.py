"""The daemon's interface on a real server in the test's own loop, and clients that do not wait long."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import httpx

from mover.api_client import DaemonAccess, DaemonClient
from mover.api_tokens import parse_tokens
from mover.daemon_health import HealthMonitor
from mover.daemon_http import DaemonApp
from mover.daemon_http_access import Access
from mover.daemon_jobs import JobService
from mover.daemon_notify import Notifier
from mover.daemon_pages import application
from mover.daemon_probes import LtsProbe
from mover.daemon_scicat import CatalogueTrigger
from mover.daemon_server import DaemonServer
from mover.daemon_view import DaemonView
from mover.daemon_watchdog import LoopWatchdog
from mover.policies.retry import RetryPolicy
from mover.settings_rules import Secret

__all__ = ["OPERATOR", "QUICK", "READER", "TOKENS", "Served", "browser", "client_of", "serve"]

READER, OPERATOR = "reader-0123456789", "operator-0123456789"
TOKENS = Access(parse_tokens(f"eye:read:{READER}\nscicat:operate:{OPERATOR}", "a test"))
QUICK = RetryPolicy(attempts=1000, base_s=0.05, cap_s=0.1, throttle_base_s=0.05, retry_after_cap_s=0.1)


class Served:
    """A server that runs; ``port`` stays the same when the next one is given it."""

    def __init__(self, app: DaemonApp, health: HealthMonitor, port: int) -> None:
        self.app, self.health, self.port = app, health, port
        self.url = f"http://127.0.0.1:{port}"


@asynccontextmanager
async def serve(
    service: JobService | None,
    access: Access | None = None,
    *,
    scicat: CatalogueTrigger | None = None,
    port: int = 0,
    heartbeat_s: float = 15.0,
) -> AsyncIterator[Served]:
    """All routes of the daemon, as its process composes them. ``service``: None as long as there is no engine."""
    nowhere = Path("/nonexistent")
    health = HealthMonitor()
    view = DaemonView(health, LtsProbe(nowhere, nowhere, 0.0), LoopWatchdog(Notifier({})).state)
    view.service.set(service)
    app, gate = application(view, access or Access(), scicat=scicat, heartbeat_s=heartbeat_s)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(100)
        listener.setblocking(False)
        server = DaemonServer(gate)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.serve, [listener])
            yield Served(app, health, listener.getsockname()[1])
            app.streams.close()
            server.stop()


@asynccontextmanager
async def browser(served: Served, token: str = "", **headers: str) -> AsyncIterator[httpx.AsyncClient]:
    """A plain client."""
    given = {"Authorization": f"Bearer {token}"} if token else {}
    async with httpx.AsyncClient(base_url=served.url, headers=given | headers, timeout=20, trust_env=False) as client:
        yield client


@asynccontextmanager
async def client_of(served: Served, token: str = "") -> AsyncIterator[DaemonClient]:
    """The daemon's own client."""
    access = DaemonAccess(served.url, Secret(token) if token else None)
    async with DaemonClient.open(access, retry=QUICK) as client:
        yield client
