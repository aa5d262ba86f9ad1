"""The kinds of values a setting can have: how each is read, and what is said when it is not allowed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from mover.errors import ConfigError

__all__ = ["API_PREFIX", "BUCKET", "ENDPOINT", "PATH", "WORD", "Rule", "Secret", "choice", "endpoint_url", "whole"]

_ENDPOINT_FORM = "host:port, or http://host[:port] or https://host[:port], without path and credentials"


class Secret:
    """A text that is never shown: ``str``, ``repr`` and formatting give a mask, no serializer knows it."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text itself, for the one place that sends it."""
        return self._text

    def __repr__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> tuple[Any, ...]:
        """Refuses to be pickled or copied to another process."""
        raise TypeError(type(self).__name__)


class Rule(NamedTuple):
    """How a value is read: ``read`` gets a text or an integer that is not empty and raises ValueError when refused."""

    read: Callable[[Any], Any]
    allowed: str
    secret: bool = False

    def parse(self, name: str, value: object, origin: str) -> Any:  # noqa: ANN401 - as many types as settings
        """The value as the setting's type.  Raises ConfigError."""
        try:
            return self.read(_plain(value))
        except (ValueError, TypeError) as error:
            shown = Secret("") if self.secret else _without_credentials(value)
            raise ConfigError(name, shown, self.allowed, origin) from error


def _plain(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, Path, Secret)):
        raise TypeError
    text = value.reveal() if isinstance(value, Secret) else str(value)
    if not text.strip() or "\0" in text:
        raise ValueError
    return text


def _without_credentials(value: object) -> object:
    return "***@" + value.rpartition("@")[2] if isinstance(value, str) and "@" in value else value


def whole(low: int, high: int | None = None) -> Rule:
    """A whole number from ``low`` to ``high``, both included."""

    def read(text: str) -> int:
        number = int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else None
        if number is None or number < low or (high is not None and number > high):
            raise ValueError
        return number

    return Rule(read, f"a whole number, {low} or more" if high is None else f"a whole number from {low} to {high}")


def choice(*words: str) -> Rule:
    """One of ``words``."""

    def read(text: str) -> str:
        if text not in words:
            raise ValueError
        return text

    return Rule(read, " or ".join(words))


def _matching(pattern: str, allowed: str) -> Rule:
    def read(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError
        return text

    return Rule(read, allowed)


def _read_path(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute():
        raise ValueError
    return path


def _read_endpoint(text: str) -> str:
    _split_endpoint(text)
    return text


def _split_endpoint(text: str) -> tuple[str, str]:
    """Scheme ('' when there is none) and ``host[:port]``.  Raises ValueError."""
    scheme, separator, rest = text.rpartition("://")
    if separator and scheme not in {"http", "https"}:
        raise ValueError
    location = rest.removesuffix("/") if separator else rest
    host, _, port = location.rpartition(":") if re.search(r":[0-9]+\Z", location) else (location, "", "")
    if not port and not separator:
        raise ValueError
    if port and not 1 <= int(port) <= 65535:
        raise ValueError
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]", host):
        raise ValueError
    return scheme, location


def endpoint_url(value: str) -> str:
    """The URL of an endpoint, without a slash at the end.

    A URL stays what it is. Without a scheme, ``host:port`` is reached by plain HTTP when the host is this machine
    (``localhost``, ``127.*``, ``[::1]``) or a name without dots, as services in one container network have; and by
    HTTPS otherwise. A host elsewhere that speaks plain HTTP has to be written as ``http://host:port``.

    Raises:
        ConfigError: neither ``host:port`` nor such a URL.
    """
    try:
        scheme, location = _split_endpoint(value)
    except ValueError as error:
        raise ConfigError("endpoint", _without_credentials(value), _ENDPOINT_FORM) from error
    if not scheme:
        host = urlsplit(f"//{location}").hostname or ""
        near = host == "::1" or re.fullmatch(r"127(\.[0-9]+){3}", host) or not re.search(r"[.:]", host)
        scheme = "http" if near else "https"
    return f"{scheme}://{location}"


PATH = Rule(_read_path, "an absolute path")
WORD = _matching(r"\S+", "a text without blanks")
ENDPOINT = Rule(_read_endpoint, _ENDPOINT_FORM)
BUCKET = _matching(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", "a bucket name: 3 to 63 of a-z, 0-9, dot and hyphen")
API_PREFIX = _matching(r"/(?:[A-Za-z0-9._~-]+/)*", "a path that begins and ends with a slash")
