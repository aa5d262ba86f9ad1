"""What SciCat answers: bodies read defensively, because proxies answer for it, and its errors have many shapes."""

from __future__ import annotations

import re
import time
from email.utils import parsedate_to_datetime
from typing import Any, Final, Literal

import msgspec

from mover.errors import CatalogueAccessError

__all__ = ["Call", "Reply", "api_prefixes", "describe", "is_json", "message_of", "retry_after_s"]

_REASON_CHARACTERS = 400
_NO_ROUTE: Final = re.compile(r"Cannot (GET|POST|PUT|PATCH|DELETE) ")
_VERSIONED: Final = re.compile(r"(?P<base>.*/)v[34]/")


class Call(msgspec.Struct, frozen=True):
    """One request. ``op`` and ``target`` are what error messages name; ``path`` is percent-encoded already."""

    op: str
    target: str
    method: Literal["GET", "POST", "PATCH", "DELETE"]
    path: str
    api: Literal["v3", "v4"] = "v3"
    query: dict[str, str] = {}
    body: bytes | None = None


class Reply(msgspec.Struct, frozen=True):
    """An answer that came from the catalogue itself; ``reason`` is its status and message, fit to be shown."""

    call: Call
    status: int
    body: bytes
    reason: str

    @property
    def ok(self) -> bool:
        """Whether the call was carried out."""
        return 200 <= self.status < 300

    @property
    def missing(self) -> bool:
        """Whether the catalogue knows this kind of resource, and has none of this id."""
        return self.status == 404 and not self.no_route

    @property
    def no_route(self) -> bool:
        """Whether this release of the catalogue does not have the route, or a proxy has changed the path."""
        return self.status == 404 and _NO_ROUTE.match(message_of(self.body)) is not None

    def refused(self) -> CatalogueAccessError:
        """The error for an answer that nobody expected."""
        reason = self.reason
        if self.no_route:
            reason += "; is the API prefix right, and does no proxy decode %2F in paths?"
        return CatalogueAccessError(self.call.op, self.call.target, reason)

    def check(self) -> Reply:
        """Itself.  Raises CatalogueAccessError when the call was not carried out."""
        if not self.ok:
            raise self.refused()
        return self

    def record(self) -> dict[str, Any]:
        """The JSON object in the body.  Raises CatalogueAccessError when there is none."""
        value = self.value()
        if not isinstance(value, dict):
            raise self.unreadable()
        return value

    def records(self) -> list[dict[str, Any]]:
        """The JSON objects in the body's list.  Raises CatalogueAccessError when it is no such list."""
        value = self.value()
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.unreadable()
        return value

    def value(self) -> Any:  # noqa: ANN401 - JSON
        """The JSON in the body, None when it is no JSON."""
        return _parse(self.check().body)

    def unreadable(self) -> CatalogueAccessError:
        """The error for a body that says success and is not what was asked for."""
        what = _kind_of(self.body)
        reason = f"the answer, status {self.status}, is not what SciCat sends: {what}"
        return CatalogueAccessError(self.call.op, self.call.target, reason)


def api_prefixes(prefix: str) -> dict[str, str]:
    """The prefixes of the API's versions, from that of version 3; without ``v4`` when it cannot be derived."""
    match = _VERSIONED.fullmatch(prefix)
    if match is None:
        return {"v3": prefix}
    return {version: f"{match['base']}{version}/" for version in ("v3", "v4")}


def message_of(body: bytes) -> str:
    """What an error's body says to people; '' when it is no JSON."""
    found = _parse(body)
    if isinstance(found, dict):
        found = found.get("message") or found.get("error") or found.get("details")
        if isinstance(found, dict):  # the message repeats the whole error in some releases
            found = found.get("message") or found.get("error")
    if isinstance(found, list):
        found = "; ".join(item for item in found if isinstance(item, str))
    text = found if isinstance(found, str) else ""
    return "".join(character if character.isprintable() else " " for character in text)[:_REASON_CHARACTERS]


def describe(status: int, body: bytes) -> str:
    """Status and message of an error."""
    return f"status {status}: {message_of(body) or _kind_of(body)}"


def retry_after_s(value: str | None) -> float | None:
    """Seconds of a ``Retry-After``, which is a number or a date; None when there is none."""
    if value is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}", value.strip()):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def is_json(body: bytes) -> bool:
    """Whether the body is JSON, as all of SciCat's errors are."""
    return _parse(body) is not None


def _parse(body: bytes) -> Any:  # noqa: ANN401 - JSON
    try:
        return msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return None


def _kind_of(body: bytes) -> str:
    if not body.strip():
        return "an empty body"
    if body.lstrip()[:1] == b"<":
        return "an HTML page, as from a proxy"
    return f"{len(body):,} bytes of another form" if _parse(body) is None else "JSON of another form"
