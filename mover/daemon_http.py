"""The daemon's HTTP interface as an ASGI application: jobs, their events, limits, and the document that describes it.

In front of the routes stands a door: it gives every request its id, turns away what other sites' pages send, and finds
out who asks. ``GET`` needs the role read, everything else the role operate; ``OPEN_PATHS`` need none.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final
from urllib.parse import unquote

from litestar import Litestar
from litestar.di import Provide
from litestar.enums import ScopeType
from litestar.handlers.base import BaseRouteHandler
from litestar.routes import HTTPRoute
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from mover.api import Problem
from mover.daemon_http_access import LOCAL, Access, Caller, is_foreign, is_loopback_name
from mover.daemon_http_bodies import BODY_LIMIT_BYTES
from mover.daemon_http_problems import EXCEPTION_HANDLERS, PROBLEM_TYPE, problem_bytes
from mover.daemon_http_routes import JOB_ROUTES
from mover.daemon_http_schema import openapi_config
from mover.daemon_http_streams import HEARTBEAT_S, Streams
from mover.daemon_jobs import JobService
from mover.daemon_scicat import TRIGGER_ROUTE, CatalogueTrigger

__all__ = ["COOKIE", "OPEN_PATHS", "DaemonApp", "create_app"]

COOKIE: Final = "mover_token"
"""The cookie in which the live page may keep a token; taken for reading alone where there is no ``Authorization``."""

OPEN_PATHS: Final = frozenset({"/livez", "/readyz", "/schema", "/login", "/page"})
"""Paths that need no token, with what is below them."""

_BASIC_PATHS: Final = frozenset({"/v1/scicat/jobs"})
_READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_SANE_ID: Final = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_COOKIE_PAIR: Final = re.compile(rf"(?:\A|;\s*){COOKIE}=([^;]*)")
_HEADERS: Final = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))


class DaemonApp:
    """What a server serves. ``streams``: the open event streams; close them before the server waits for its requests.

    ``hosts``: names besides this host's own under which it is reached without tokens.
    """

    def __init__(self, inner: Litestar, access: Access, streams: Streams, hosts: frozenset[str]) -> None:
        self.inner, self.access, self.streams = inner, access, streams
        self._hosts = hosts
        self._methods = tuple(_methods(inner))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != ScopeType.HTTP:
            await self.inner(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        state: dict[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id
        told = _telling(send, request_id)
        verdict = self._judge(scope, headers)
        if isinstance(verdict, Caller) and scope["method"] == "OPTIONS":
            await self._tell_methods(scope, told)
        elif isinstance(verdict, Caller):
            state["caller"] = verdict
            await self.inner(scope, receive, told)
        else:
            await _refuse(verdict, scope, told)

    async def _tell_methods(self, scope: Scope, send: Send) -> None:
        """Answers OPTIONS. Litestar's own answer forgets methods of paths that have several handlers."""
        allowed = next((methods for path, methods in self._methods if path.fullmatch(scope["path"])), None)
        if allowed is None:
            await _refuse(Problem("Not Found", 404, "Not Found"), scope, send)
            return
        headers = [(b"allow", allowed.encode())]
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _judge(self, scope: Scope, headers: dict[str, str]) -> Caller | Problem:
        host, path, method = headers.get("host", ""), scope["path"], str(scope.get("method", "GET"))
        if not self.access.guarded and not is_loopback_name(host, also=self._hosts):
            return Problem("Forbidden", 403, f"without tokens, the daemon is not reached as {host[:200]!r}")
        authorization = headers.get("authorization", "")
        by_token = authorization[:7].lower() == "bearer "
        if not by_token and method not in _READING:
            foreign = is_foreign(headers.get("origin", ""), host, headers.get("sec-fetch-site", ""))
            if foreign:
                return Problem("Forbidden", 403, "pages of other sites can order nothing here")
        if any(path == item or path.startswith(f"{item}/") for item in OPEN_PATHS):
            return LOCAL
        cookie = _COOKIE_PAIR.search(headers.get("cookie", "")) if method in _READING else None
        caller = self.access.caller(
            authorization, cookie_token=unquote(cookie.group(1)) if cookie else "", basic=path in _BASIC_PATHS
        )
        if caller is None:
            return Problem("Unauthorized", 401, "a token of the daemon's token file is needed")
        if caller.role == "read" and method not in _READING:
            return Problem("Forbidden", 403, f"{caller.name!r} may read, and not operate")
        return caller


def create_app(
    service: JobService,
    access: Access,
    *,
    scicat: CatalogueTrigger | None = None,
    extra_routes: Sequence[BaseRouteHandler] = (),
    hosts: Iterable[str] = (),
    heartbeat_s: float = HEARTBEAT_S,
) -> DaemonApp:
    """The application.

    Args:
        service: the jobs.
        access: who may do what.
        scicat: takes what SciCat tells of; None: there is no such path.
        extra_routes: route handlers of litestar besides the ones here; those outside of ``OPEN_PATHS`` need a token.
        hosts: names under which the daemon may be reached where there are no tokens, besides this host's own.
        heartbeat_s: an event stream is never silent for longer.
    """
    streams = Streams(heartbeat_s=heartbeat_s)
    inner = Litestar(
        route_handlers=[*JOB_ROUTES, *([] if scicat is None else [TRIGGER_ROUTE]), *extra_routes],
        dependencies={
            "service": Provide(_giving(service), sync_to_thread=False, use_cache=True),
            "scicat": Provide(_giving(scicat), sync_to_thread=False, use_cache=True),
            "streams": Provide(_giving(streams), sync_to_thread=False, use_cache=True),
        },
        exception_handlers=EXCEPTION_HANDLERS,
        openapi_config=openapi_config(),
        request_max_body_size=BODY_LIMIT_BYTES,
        debug=False,
        logging_config=None,
    )
    return DaemonApp(inner, access, streams, frozenset(hosts))


def _methods(inner: Litestar) -> Iterator[tuple[re.Pattern[str], str]]:
    """Each path of the application with its methods."""
    for route in inner.routes:
        if isinstance(route, HTTPRoute):
            pattern = re.sub(r"\\{\w+\\}", "[^/]+", re.escape(route.path_format))
            yield re.compile(pattern), ", ".join(sorted(route.methods))


def _giving(value: Any) -> Callable[[], Any]:  # noqa: ANN401 - a dependency of any type
    def provide() -> Any:  # noqa: ANN401
        return value

    return provide


def _telling(send: Send, request_id: str) -> Send:
    """``send`` with the headers that every answer has."""
    own = [(b"x-request-id", request_id.encode()), *_HEADERS]

    async def told(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message["headers"])
            names = {name.lower() for name, _ in headers}
            own_now = [*own] if b"cache-control" in names else [*own, (b"cache-control", b"no-store")]
            message["headers"] = [*headers, *own_now]
        await send(message)

    return told


async def _refuse(problem: Problem, scope: Scope, send: ASGIApp | Send) -> None:
    headers = [(b"content-type", PROBLEM_TYPE.encode())]
    if problem.status == 401:
        schemes = 'Bearer realm="mover"'
        if scope["path"] in _BASIC_PATHS:
            schemes += ', Basic realm="mover", charset="UTF-8"'
        headers.append((b"www-authenticate", schemes.encode()))
    body = problem_bytes(problem, scope)
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})  # type: ignore[call-arg,arg-type]
    await send({"type": "http.response.body", "body": body, "more_body": False})  # type: ignore[call-arg,arg-type]
