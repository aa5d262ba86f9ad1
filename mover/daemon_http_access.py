"""Who may do what at the daemon's interface: tokens, and what keeps a browser from being used against it."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from mover.api_tokens import Role, Token, read_token_file

__all__ = ["LOCAL", "Access", "Caller", "is_foreign", "is_loopback_name"]


class Caller(msgspec.Struct, frozen=True):
    """Who asks; ``name`` is on whose account the jobs run."""

    name: str
    role: Role


LOCAL: Final = Caller("local", "operate")
"""Everybody, where there is no token file: the daemon listens on this host alone then."""


class Access:
    """The tokens that are good now; none: everybody on this host may operate."""

    def __init__(self, tokens: Iterable[Token] = (), *, path: Path | None = None) -> None:
        self._path = path
        self._callers = _digests(tokens)

    @classmethod
    def from_file(cls, path: Path | None) -> Access:
        """What a token file says; None: no tokens. Blocking.  Raises ConfigError."""
        return cls() if path is None else cls(read_token_file(path), path=path)

    def reload(self) -> None:
        """Reads the file again. Blocking.  Raises ConfigError; the tokens stay as they were then."""
        if self._path is not None:
            self._callers = _digests(read_token_file(self._path))

    @property
    def guarded(self) -> bool:
        """Whether a token is needed."""
        return self._path is not None or bool(self._callers)

    def holder(self, token: str) -> Caller | None:
        """Who holds the token; None when nobody does. As long for every token, good or bad."""
        digest = sha256(token.encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, caller in self._callers:
            if hmac.compare_digest(known, digest):
                found = caller
        return found

    def caller(self, authorization: str, *, cookie_token: str = "", basic: bool = False) -> Caller | None:
        """Who sent a request with this ``Authorization`` header; None when that is nobody.

        ``cookie_token``: from the page's cookie, used where there is no header. ``basic``: user and password are
        taken, too: a token's name and the token.
        """
        if not self.guarded:
            return LOCAL
        scheme, _, value = authorization.strip().partition(" ")
        if scheme.lower() == "bearer":
            return self.holder(value.strip())
        if basic and scheme.lower() == "basic":
            user, password = _basic(value.strip())
            found = self.holder(password)
            return found if found is not None and hmac.compare_digest(found.name.encode(), user.encode()) else None
        return self.holder(cookie_token) if cookie_token and not authorization else None


def _digests(tokens: Iterable[Token]) -> tuple[tuple[bytes, Caller], ...]:
    return tuple((sha256(token.secret.reveal().encode()).digest(), Caller(token.name, token.role)) for token in tokens)


def _basic(value: str) -> tuple[str, str]:
    try:
        user, _, password = base64.b64decode(value, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return "", ""
    return user, password


def is_loopback_name(host: str, *, also: frozenset[str] = frozenset()) -> bool:
    """Whether a ``Host`` header names this machine, or is one of ``also``: a name of elsewhere may be rebound to it."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name in {"", "localhost"} or name.endswith(".localhost") or name in also:
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def is_foreign(origin: str, host: str, fetch_site: str) -> bool:
    """Whether a page of another site sent a request, by ``Origin``, ``Host`` and ``Sec-Fetch-Site``."""
    if fetch_site in {"cross-site", "same-site"}:
        return True
    if not origin:
        return False
    try:
        return urlsplit(origin).netloc.lower() != host.lower()
    except ValueError:
        return True
