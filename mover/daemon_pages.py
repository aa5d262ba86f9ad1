"""The routes of the page, of health and of metrics, and the way from a login to the door that asks for tokens.

A browser keeps no token: it gets the number of a session, which ends after twelve hours, with the daemon, or with its
token, and which is good for reading alone.
"""

from __future__ import annotations

import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from hashlib import sha256
from typing import Annotated, Any, Final
from urllib.parse import parse_qs, quote

import anyio
import msgspec
from litestar import Request, Response, get, post
from litestar.exceptions import NotFoundException
from litestar.handlers.base import BaseRouteHandler
from litestar.params import PathParameter
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from mover.daemon_health import Readiness
from mover.daemon_http import DaemonApp, create_app
from mover.daemon_http_access import Access
from mover.daemon_http_streams import HEARTBEAT_S
from mover.daemon_metrics import CONTENT_TYPE
from mover.daemon_page import ASSETS, asset, render_login
from mover.daemon_scicat import CatalogueTrigger
from mover.daemon_view import DaemonView
from mover.daemon_watchdog import Liveness, LoopState

__all__ = ["SESSION", "PageGate", "Sessions", "application"]

_COOKIE: Final = "mover_token"  # where the door looks
SESSION: Final = "mover_session"  # where the gate leaves the number for the routes
_PAIR: Final = re.compile(rb"(\A|;\s*)mover_token=([^;]*)")
_LIFE_S: Final = 12 * 3600.0
_SESSIONS: Final = 1000
_REFUSAL_S: Final = 0.5
_FORM_BYTES: Final = 16 << 10  # it is taken apart for whoever sends one
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:;"
    " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_PAGE_HEADERS: Final = {"Content-Security-Policy": _POLICY, "X-Frame-Options": "DENY", "Cache-Control": "no-store"}
_Ask = Request[Any, Any, Any]


class Sessions:
    """Numbers that browsers have instead of tokens."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tokens: OrderedDict[bytes, tuple[float, str]] = OrderedDict()

    def begin(self, token: str) -> str:
        """The number of a new session."""
        number = secrets.token_urlsafe(32)
        self._tokens[sha256(number.encode()).digest()] = (self._clock() + _LIFE_S, token)
        while len(self._tokens) > _SESSIONS:
            self._tokens.popitem(last=False)
        return number

    def token(self, number: str) -> str:
        """The token behind a session, '' when it is over."""
        end_s, token = self._tokens.get(_digest(number), (0.0, ""))
        return token if self._clock() < end_s else ""

    def end(self, number: str) -> None:
        """The session is over."""
        self._tokens.pop(_digest(number), None)


def _digest(number: str) -> bytes:
    return sha256(number.encode("utf-8", "surrogateescape")).digest()


class PageGate:
    """Stands before the door: shows it the token of a session, and who is turned away from the page, the login."""

    def __init__(self, inner: ASGIApp, sessions: Sessions) -> None:
        self._inner, self._sessions = inner, sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if str(scope["type"]) != "http":
            await self._inner(scope, receive, send)
            return
        cookies = b"; ".join(value for name, value in scope["headers"] if name == b"cookie")
        found = _PAIR.search(cookies)
        headers = [(name, self._translated(value) if name == b"cookie" else value) for name, value in scope["headers"]]
        number = found.group(2).decode("latin-1") if found else ""
        inner_scope = {**scope, "headers": headers, SESSION: number}
        to_login = _to_login(send) if scope["path"] == "/" else send
        await self._inner(inner_scope, receive, to_login)  # type: ignore[arg-type]

    def _translated(self, cookies: bytes) -> bytes:
        def token_of(match: re.Match[bytes]) -> bytes:
            token = self._sessions.token(match.group(2).decode("latin-1"))
            return match.group(1) + f"{_COOKIE}={quote(token, safe='')}".encode()

        return _PAIR.sub(token_of, cookies)


def _to_login(send: Send) -> Send:
    refused = False

    async def told(message: Message) -> None:
        nonlocal refused
        if message["type"] == "http.response.start" and message["status"] == 401:
            refused = True
            headers = [(b"location", b"/login"), (b"content-length", b"0"), (b"cache-control", b"no-store")]
            message = {"type": "http.response.start", "status": 303, "headers": headers}
        elif refused and message["type"] == "http.response.body":
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await send(message)

    return told


def application(
    view: DaemonView, access: Access, *, scicat: CatalogueTrigger | None = None, heartbeat_s: float = HEARTBEAT_S
) -> tuple[DaemonApp, PageGate]:
    """All that the daemon serves, and the gate before it, which is what a server is given; see ``create_app``."""
    sessions = Sessions()
    own = [*_page_routes(view, access), *_login_routes(view, access, sessions), *_health_routes(view)]
    service = view.service.as_service()
    app = create_app(service, access, scicat=scicat, extra_routes=own, heartbeat_s=heartbeat_s)
    return app, PageGate(app, sessions)


def _page_routes(view: DaemonView, access: Access) -> list[BaseRouteHandler]:
    @get("/", include_in_schema=False)
    async def page() -> Response[str]:
        return Response(view.page(guarded=access.guarded), headers=_PAGE_HEADERS, media_type="text/html")

    @get("/page/{name:str}", include_in_schema=False)
    async def file(name: Annotated[str, PathParameter()]) -> Response[str]:
        if name not in ASSETS:
            raise NotFoundException
        path, media_type = ASSETS[name]
        return Response(asset(path), headers={"Cache-Control": "no-cache"}, media_type=media_type)

    return [page, file]


def _login_routes(view: DaemonView, access: Access, sessions: Sessions) -> list[BaseRouteHandler]:
    @get("/login", include_in_schema=False)
    async def form() -> Response[str]:
        return Response(render_login(view.host), headers=_PAGE_HEADERS, media_type="text/html")

    @post("/login", include_in_schema=False, request_max_body_size=_FORM_BYTES)
    async def log_in(request: _Ask) -> Response[str]:
        token = parse_qs((await request.body()).decode("utf-8", "replace")).get("token", [""])[0].strip()
        if access.guarded and access.holder(token) is None:
            await anyio.sleep(_REFUSAL_S)
            text = render_login(view.host, refused=True)
            return Response(text, status_code=403, headers=_PAGE_HEADERS, media_type="text/html")
        return _redirect("/", _cookie(request, sessions.begin(token), round(_LIFE_S)))

    @post("/login/leave", include_in_schema=False)
    async def leave(request: _Ask) -> Response[str]:
        sessions.end(str(request.scope.get(SESSION, "")))
        return _redirect("/login", _cookie(request, "", 0))

    return [form, log_in, leave]


def _cookie(request: _Ask, value: str, life_s: int) -> str:
    secure = "https" in {request.scope["scheme"], request.headers.get("x-forwarded-proto", "")}
    return f"{_COOKIE}={value}; Path=/; Max-Age={life_s}; HttpOnly; SameSite=Strict" + ("; Secure" if secure else "")


def _redirect(path: str, cookie: str) -> Response[str]:
    headers = {"Location": path, "Set-Cookie": cookie}
    return Response("", status_code=303, headers=headers, media_type="text/plain")


def _health_routes(view: DaemonView) -> list[BaseRouteHandler]:
    @get(
        "/livez",
        operation_id="live",
        tags=["health"],
        summary="Whether the daemon's loop lives, and how late its timers are",
    )
    async def livez() -> Response[bytes]:
        return _json(Liveness(alive=True, summary=_loop_text(view.loop()), loop=view.loop()))

    @get(
        "/readyz",
        operation_id="ready",
        tags=["health"],
        summary="Whether everything that is needed works: each dependency with state, latency and last success",
        description="As text, a line for each, to whoever accepts `text/plain` alone.",
    )
    async def readyz(request: _Ask) -> Response[bytes]:
        readiness = view.readiness()
        status_code = 200 if readiness.ready else 503
        if request.headers.get("accept", "").strip() == "text/plain":
            return Response(_readiness_text(readiness).encode(), status_code=status_code, media_type="text/plain")
        return _json(readiness, status_code)

    @get(
        "/metrics",
        operation_id="metrics",
        tags=["health"],
        summary="Metrics for Prometheus",
    )
    async def metrics() -> Response[bytes]:
        return Response(view.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})

    return [livez, readyz, metrics]


def _json(value: object, status_code: int = 200) -> Response[bytes]:
    return Response(msgspec.json.encode(value), status_code=status_code, media_type="application/json")


def _loop_text(loop: LoopState) -> str:
    text = f"the loop lives; its timers were at most {loop.worst_lag_s * 1000:.0f} ms late lately"
    if loop.blocked:
        text += (
            f"; it was blocked {loop.blocked} time(s), last at {loop.last_blocked_at}"
            f" for {loop.last_blocked_s:.1f} s in {loop.last_blocked_in}"
        )
    return text


def _readiness_text(readiness: Readiness) -> str:
    lines = [f"{'ready' if readiness.ready else 'not ready'}: {readiness.summary}"]
    for view in readiness.dependencies:
        latency = "" if view.latency_s is None else f"{view.latency_s * 1000:.0f} ms, "
        worked = f"worked last at {view.last_success_at}" if view.last_success_at else "never worked"
        lines.append(f"{view.name:10} {view.state:9} {latency}{worked}: {view.detail}")
    return "\n".join(lines) + "\n"
