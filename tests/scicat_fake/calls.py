"""A request as the handlers see it, and what they answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from tests.scicat_fake.errors import http_error
from tests.scicat_fake.state import Account, State

__all__ = ["Call", "Handler", "Reply", "Route"]


class Call(msgspec.Struct, kw_only=True):
    """One request: ``params`` are the decoded variable parts of the path, ``body`` is decoded JSON or a form.

    ``saved`` returns when what was changed so far survives the server; it is also awaited before any answer.
    """

    state: State
    method: str
    version: str
    params: Mapping[str, str]
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: Any
    account: Account | None
    saved: Callable[[], Awaitable[None]]

    @property
    def known(self) -> Account:
        """The account of a request that needs one.  Raises 403 for nobody."""
        if self.account is None:
            raise http_error(403, "Forbidden resource")
        return self.account

    @property
    def username(self) -> str:
        return self.account.username if self.account else "anonymous"

    def first(self, name: str) -> str | None:
        values = self.query.get(name)
        return values[0] if values else None


class Reply(msgspec.Struct):
    """An answer; ``body`` is encoded as JSON unless it is bytes."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = msgspec.field(default_factory=dict)


Handler = Callable[[Call], Reply | Awaitable[Reply]]


class Route(msgspec.Struct, frozen=True):
    """``pattern``: segments below the version, ``:name`` for a variable one; ``versions``: v3, v4 or both.

    ``public``: the account does not matter, not even an expired token.
    """

    method: str
    pattern: str
    handler: Handler
    versions: tuple[str, ...] = ("v3", "v4")
    public: bool = False
