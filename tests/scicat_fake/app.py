"""The server as an ASGI application: routing on the path as it was sent, bodies, accounts, faults, the log."""

from __future__ import annotations

import inspect
import logging
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple
from urllib.parse import parse_qs, parse_qsl, unquote, urlencode

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tests.scicat_fake import control_routes, datablocks, datasets, jobs, logins, origdatablocks
from tests.scicat_fake.access import account_of
from tests.scicat_fake.calls import Call, Reply, Route
from tests.scicat_fake.errors import ApiError, http_error, internal_error
from tests.scicat_fake.faults import fault_of, wait_out
from tests.scicat_fake.keeper import Keeper
from tests.scicat_fake.pages import overview
from tests.scicat_fake.state import Fault, LoggedRequest, State

__all__ = ["ScicatApp"]

_ROUTES: tuple[Route, ...] = (
    *logins.ROUTES,
    *datasets.ROUTES,
    *origdatablocks.ROUTES,
    *datablocks.ROUTES,
    *jobs.ROUTES,
)
_JSON = "application/json; charset=utf-8"
_LOGGER = logging.getLogger("scicat_fake")
TRANSPORT = "scicat_fake.transport"


_Save = Callable[[], Awaitable[None]]


class _Request(NamedTuple):
    method: str
    raw_path: str
    query: str
    headers: dict[str, str]
    body: bytes


def _matched(pattern: str, segments: list[str]) -> dict[str, str] | None:
    """The variable parts of a path; fixed ones may be written in any case."""
    wanted = pattern.split("/")
    if len(wanted) != len(segments):
        return None
    params = {}
    for name, segment in zip(wanted, segments, strict=True):
        if not segment:
            return None
        if name.startswith(":"):
            params[name[1:]] = unquote(segment)
        elif name.lower() != segment.lower():
            return None
    return params


class ScicatApp:
    """Answers as a SciCat backend does. ``fresh`` makes the state that the server starts and is reset with.

    With a ``keeper`` all changes are durable before the request that made them is answered.
    """

    def __init__(self, fresh: Callable[[], State], keeper: Keeper | None = None) -> None:
        self._fresh = fresh
        self._keeper = keeper
        self.state = fresh()

    def reset(self) -> None:
        """Forgets everything; requests under way still meet the old state."""
        for fault in self.state.faults:
            fault.hold = False
        self.state = self._fresh()

    async def save(self) -> None:
        if self._keeper:
            await self._keeper.keep(lambda: self.state)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        state = self.state
        request = await _read(scope, receive)
        if request.raw_path.startswith("/fake/"):
            reply = control_routes.answer(self, request.method, unquote(request.raw_path), request.query, request.body)
            if request.method != "GET":
                await self.save()
            await _send(reply, scope, receive, send)
            return
        if (request.method, request.raw_path) == ("GET", "/"):
            page = Reply(overview(state), headers={"content-type": "text/html; charset=utf-8"})
            await _send(page, scope, receive, send)
            return
        fault = fault_of(state, request.method, request.raw_path)
        reply, user = await _outcome(state, request, fault, self.save)
        closed = fault is not None and fault.close
        _log(state, request, 0 if closed else reply.status, user)
        if closed:
            scope[TRANSPORT].abort()
            while (await receive())["type"] != "http.disconnect":
                pass
        else:
            await _send(reply, scope, receive, send)


async def _read(scope: Scope, receive: Receive) -> _Request:
    parts = []
    more = True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
    path = scope["raw_path"].decode("latin-1")
    return _Request(scope["method"], path, scope["query_string"].decode("latin-1"), headers, b"".join(parts))


async def _outcome(state: State, request: _Request, fault: Fault | None, save: _Save) -> tuple[Reply, str]:
    """The answer, and who asked; a fault may keep the request from being handled, or replace the answer."""
    if fault is None:
        return await _handled(state, request, save)
    reply, user = Reply(), "-"
    if fault.handled:
        reply, user = await _handled(state, request, save)
        await wait_out(state, fault)
    else:
        await wait_out(state, fault)
        if not fault.close and fault.status is None:
            reply, user = await _handled(state, request, save)
    if fault.status is not None:
        reply = Reply(fault.body.encode(), fault.status, {"content-type": fault.content_type, **fault.headers})
    return reply, user


async def _handled(state: State, request: _Request, save: _Save) -> tuple[Reply, str]:
    """The answer, once what it says is saved: an error may have changed something, too."""
    outcome = await _answered(state, request, save)
    if request.method not in {"GET", "HEAD"}:
        await save()
    return outcome


async def _answered(state: State, request: _Request, save: _Save) -> tuple[Reply, str]:
    user = "-"
    try:
        if len(request.body) > state.switches.body_limit_bytes:
            raise internal_error()
        route, version, params = _route(state, request)
        body = _body(request)
        query = parse_qs(request.query, keep_blank_values=True)
        # A token in the query counts only when the word Bearer comes with it.
        sent = request.headers.get("authorization") or query.get("access_token", [""])[0]
        account = None if route.public else account_of(state, sent)
        user = account.username if account else "anonymous"
        call = Call(
            state=state,
            method=request.method,
            version=version,
            params=params,
            query=query,
            headers=request.headers,
            body=body,
            account=account,
            saved=save,
        )
        reply = route.handler(call)
        return (await reply if inspect.isawaitable(reply) else reply), user
    except ApiError as error:
        return Reply(error.body, error.status, error.headers), user
    except (TypeError, ValueError, KeyError, AttributeError, re.error):
        # Whatever a handler does not expect in a request, the backend does not expect either.
        _LOGGER.exception("%s %s", request.method, request.raw_path)
        return Reply("Internal server error", 500), user


def _route(state: State, request: _Request) -> tuple[Route, str, dict[str, str]]:
    segments = request.raw_path.split("/")[1:]
    if segments and not segments[-1]:
        segments.pop()
    version = segments[1].lower() if len(segments) > 1 and segments[0].lower() == "api" else ""
    if version and not (version == "v4" and state.switches.v3_only):
        for route in _ROUTES:
            if route.method == request.method and version in route.versions:
                params = _matched(route.pattern, segments[2:])
                if params is not None:
                    return route, version, params
    raise http_error(404, f"Cannot {request.method} {request.raw_path}")


def _body(request: _Request) -> Any:  # noqa: ANN401 - any JSON
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not request.body:
        return {}
    if kind == "application/x-www-form-urlencoded":
        return dict(parse_qsl(request.body.decode(), keep_blank_values=True))
    if kind not in {"application/json", "application/merge-patch+json"}:
        return {}  # other types are not read
    try:
        return msgspec.json.decode(request.body)
    except msgspec.DecodeError as error:
        raise http_error(400, f"Unexpected token in JSON: {error}") from error


def _log(state: State, request: _Request, status: int, user: str) -> None:
    query = request.query
    if "access_token" in query:
        pairs = parse_qsl(query, keep_blank_values=True)
        query = urlencode([(name, "..." if name == "access_token" else value) for name, value in pairs])
    state.log.append(LoggedRequest(time.time(), request.method, request.raw_path, query, status, user))


async def _send(reply: Reply, scope: Scope, receive: Receive, send: Send) -> None:
    content = reply.body if isinstance(reply.body, bytes) else msgspec.json.encode(reply.body)
    headers = reply.headers if isinstance(reply.body, bytes) else {"content-type": _JSON, **reply.headers}
    await Response(content, reply.status, headers)(scope, receive, send)
