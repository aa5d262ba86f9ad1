"""The way to a SciCat server: its token, the retries, and the one place where HTTP's failures become the mover's."""

from __future__ import annotations

import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import quote

import anyio
import anyio.to_thread
import httpx
import msgspec

from mover.errors import CatalogueAccessError, CatalogueTransientError
from mover.policies.retry import RetryPolicy, retrying
from mover.scicat_reply import Call, Reply, api_prefixes, describe, is_json, retry_after_s

__all__ = ["PATIENCE", "Concealed", "SciCatAccess", "SciCatSession", "segment"]

T = TypeVar("T")

PATIENCE: Final = RetryPolicy(attempts=10, base_s=0.5, throttle_base_s=1.0)
"""Outlasts a restart of the catalogue: about a minute in the mean."""

_RENEW_AT = 0.8  # of a token's life
_UNKNOWN_LIFE_S = 900.0  # of a token whose life the server does not tell
_POSTPONED_S = 30.0  # until a renewal that failed is tried again, while the token still holds
_DENIED = frozenset({401, 403})
_PASSING = frozenset({408, 425, 429})
_JSON = "application/json"  # compared by the server to the letter


class Concealed(Protocol):
    """A secret that shows itself only on demand, as the settings' secrets do."""

    def reveal(self) -> str:
        """The text itself."""
        ...


class SciCatAccess(msgspec.Struct, frozen=True):
    """Where SciCat is and who the mover is there. ``api_prefix`` is that of version 3; version 4's follows from it.

    ``max_body_bytes`` is what the server takes as one request (its ``MAX_FILE_UPLOAD_SIZE``, 16 MiB by default).
    """

    endpoint_url: str
    user: str
    password: Concealed
    api_prefix: str = "/api/v3/"
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 60.0
    max_connections: int = 8
    max_body_bytes: int = 16 << 20

    def __repr__(self) -> str:
        return f"SciCatAccess({self.endpoint_url!r}, user={self.user!r}, password=***)"


class _Token(msgspec.Struct, frozen=True):
    text: str
    renew_at_s: float
    expires_at_s: float

    def __repr__(self) -> str:
        return "_Token(***)"


def segment(identifier: str) -> str:
    """An id as one segment of a path: a PID keeps its slash as ``%2F``."""
    return quote(identifier, safe="")


class SciCatSession:
    """Sends calls with a valid token, in which anybody's renewal serves all."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        access: SciCatAccess,
        policy: RetryPolicy,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
        rng: Callable[[], float] = random.random,
    ) -> None:
        self.access = access
        self._client, self._policy = client, policy
        self._clock, self._sleep, self._rng = clock, sleep, rng
        self._prefixes = api_prefixes(access.api_prefix)
        self._lock = anyio.Lock()
        self._token: _Token | None = None

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        access: SciCatAccess,
        policy: RetryPolicy = PATIENCE,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
        rng: Callable[[], float] = random.random,
    ) -> AsyncIterator[SciCatSession]:
        """A session over a pool of connections; nothing is sent before the first call."""
        make_client = partial(
            httpx.AsyncClient,
            base_url=access.endpoint_url,
            timeout=httpx.Timeout(access.read_timeout_s, connect=access.connect_timeout_s, pool=None),
            limits=httpx.Limits(max_connections=access.max_connections),
            follow_redirects=False,
            headers={"Accept": _JSON, "User-Agent": "mover"},
        )
        # The certificates of the authorities are files.
        async with await anyio.to_thread.run_sync(make_client) as client:
            yield cls(client, access, policy, clock=clock, sleep=sleep, rng=rng)

    @property
    def has_v4(self) -> bool:
        """Whether the prefix of version 4 is known."""
        return "v4" in self._prefixes

    async def call(self, call: Call) -> Reply:
        """Sends a call that may be repeated, until it is answered; the answer may be a refusal, other than of access.

        Raises:
            CatalogueTransientError: it failed as often as the policy repeats it.
            CatalogueAccessError: login or access is refused, or the server redirects.
        """
        return await self.repeating(lambda: self.call_once(call))

    async def repeating(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Awaits ``operation``, repeated under the session's policy."""
        return await retrying(operation, self._policy, sleep=self._sleep, rng=self._rng)

    async def call_once(self, call: Call) -> Reply:
        """One attempt.  Raises as ``call``; after a CatalogueTransientError it may have been carried out or not."""
        token = await self._valid_token()
        reply = await self._send(call, token)
        if reply.status in _DENIED:
            # Before release 5.2 an expired token makes the caller anonymous, which looks like a lack of rights.
            reply = await self._send(call, await self._valid_token(stale=token))
        if reply.status in _DENIED:
            raise reply.refused()
        return reply

    async def identity(self) -> dict[str, Any]:
        """Who the server takes the mover for; makes sure that it is somebody, with a new token if needed.

        A list without entries means nothing before this: to an anonymous caller, private things do not exist.

        Raises:
            CatalogueTransientError, CatalogueAccessError: as ``call``; or the server knows nobody.
        """
        reply = await self.call(Call("identify", self.access.user, "GET", "users/my/identity"))
        profile = reply.record().get("profile")
        if not isinstance(profile, dict) or not profile.get("username"):
            raise reply.unreadable()
        return profile

    async def health(self) -> str:
        """What the server says about itself without a login: ``ok``, or something else."""
        call = Call("check health of", self.access.endpoint_url, "GET", "health")
        reply = await self.repeating(lambda: self._send(call, None))
        if not reply.ok:
            return reply.reason
        return str(reply.record().get("status"))

    async def _valid_token(self, stale: str | None = None) -> str:
        async with self._lock:
            held, now_s = self._token, self._clock()
            if held is not None and held.text != stale and now_s < held.renew_at_s:
                return held.text
            try:
                self._token = await self._log_in()
            except CatalogueTransientError:
                if held is None or held.text == stale or now_s >= held.expires_at_s:
                    raise
                later_s = min(held.expires_at_s, now_s + _POSTPONED_S)
                self._token = msgspec.structs.replace(held, renew_at_s=later_s)
            return self._token.text

    async def _log_in(self) -> _Token:
        began_s = self._clock()
        body = msgspec.json.encode({"username": self.access.user, "password": self.access.password.reveal()})
        reply = await self._send(Call("log in", self.access.user, "POST", "auth/login", body=body), None)
        answer = reply.record()
        text = answer.get("access_token") or answer.get("id")
        if not isinstance(text, str) or not text.isascii() or not text.isprintable():
            raise reply.unreadable()
        lives_s = _seconds(answer.get("expires_in")) or _seconds(answer.get("ttl")) or _UNKNOWN_LIFE_S
        return _Token(text, began_s + _RENEW_AT * lives_s, began_s + lives_s)

    async def _send(self, call: Call, token: str | None) -> Reply:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        if call.body is not None:
            headers["Content-Type"] = _JSON
        try:
            response = await self._client.request(
                call.method,
                self._prefixes[call.api] + call.path,
                params=call.query or None,
                content=call.body,
                headers=headers,
            )
        except httpx.RequestError as error:
            raise _translated(call, error) from error
        reason = self._redacted(describe(response.status_code, response.content), token)
        asked_s = retry_after_s(response.headers.get("Retry-After"))
        return _accepted(Reply(call, response.status_code, response.content, reason), asked_s)

    def _redacted(self, text: str, token: str | None) -> str:
        for secret in (self.access.password.reveal(), token):
            if secret:
                text = text.replace(secret, "***")
        return text


def _accepted(reply: Reply, asked_s: float | None) -> Reply:
    """The reply.  Raises when it says that the call should be repeated, or sent elsewhere."""
    call, status = reply.call, reply.status
    if status >= 500 or status in _PASSING:
        asked_s = 0.0 if asked_s is None and status == 429 else asked_s
        raise CatalogueTransientError(call.op, call.target, reply.reason, asked_s)
    if 300 <= status < 400:
        raise CatalogueAccessError(call.op, call.target, f"status {status}: redirected; is the endpoint right?")
    if status == 404 and not is_json(reply.body):
        # SciCat says it in JSON. A proxy says it for the time that the server behind it restarts.
        raise CatalogueTransientError(call.op, call.target, f"{reply.reason}; not SciCat's answer")
    return reply


def _translated(call: Call, error: httpx.RequestError) -> CatalogueTransientError | CatalogueAccessError:
    reason = f"{type(error).__name__}: {error}".removesuffix(": ")
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return CatalogueAccessError(call.op, call.target, reason)
        cause = cause.__cause__ or cause.__context__
    return CatalogueTransientError(call.op, call.target, reason)


def _seconds(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and value > 0 else None
