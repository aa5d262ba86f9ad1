"""The file with the daemon's tokens, read by the daemon and by its clients. A line is ``name:role:token`` or a token.

Empty lines and those that begin with ``#`` say nothing. A bare token belongs to ``operator``, who may operate.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final, Literal

import msgspec

from mover.errors import ConfigError
from mover.settings_rules import Secret

__all__ = ["Role", "Token", "first_token", "parse_tokens", "read_token_file"]

Role = Literal["read", "operate"]

_KEY: Final = "MOVER_TOKEN_FILE"
_ROLES: Final[dict[str, Role]] = {"read": "read", "operate": "operate"}
_FILE_LIMIT_BYTES: Final = 1 << 20
_LINE_FORM: Final = "lines of the form name:role:token with role read or operate, or a bare token; see line {}"
_WORD_FORM: Final = "tokens of 16 characters or more, printable ASCII without blanks; see line {}"
_ONE_OWNER: Final = "a token that stands there once; see line {}"
_SHORTEST: Final = 16


class Token(msgspec.Struct, frozen=True):
    """Who holds a token, and what that lets them do. ``operate`` includes ``read``."""

    name: str
    role: Role
    secret: Secret


def read_token_file(path: Path) -> tuple[Token, ...]:
    """The tokens of a file that others cannot read. Blocking.

    Raises:
        ConfigError: it cannot be read, others can read it, a line has another form, or there is no token in it.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(_FILE_LIMIT_BYTES + 1)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(_KEY, str(path), f"a readable text file: {reason}") from error
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        raise ConfigError(_KEY, str(path), f"a file that others can neither read nor write (chmod o-rw {path})")
    if len(content) > _FILE_LIMIT_BYTES:
        raise ConfigError(_KEY, str(path), "a file of at most 1 MiB")
    return parse_tokens(text, str(path))


def parse_tokens(text: str, origin: str) -> tuple[Token, ...]:
    """The tokens of a file's text.  Raises ConfigError as ``read_token_file``."""
    tokens: list[Token] = []
    known: set[str] = set()
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        token = _parse_line(line.strip(), number, origin)
        if token.secret.reveal() in known:
            raise ConfigError(_KEY, origin, _ONE_OWNER.format(number))
        known.add(token.secret.reveal())
        tokens.append(token)
    if not tokens:
        raise ConfigError(_KEY, origin, "a file with a token")
    return tuple(tokens)


def _parse_line(line: str, number: int, origin: str) -> Token:
    name, role, text = line.split(":", 2) if line.count(":") >= 2 else ("operator", "operate", line)
    if not name.strip() or role.strip() not in _ROLES or (text == line and ":" in line):
        raise ConfigError(_KEY, origin, _LINE_FORM.format(number))
    text = text.strip()
    if len(text) < _SHORTEST or not text.isascii() or not text.isprintable() or " " in text:
        raise ConfigError(_KEY, origin, _WORD_FORM.format(number))
    return Token(name.strip(), _ROLES[role.strip()], Secret(text))


def first_token(tokens: tuple[Token, ...]) -> Secret:
    """The token that a client uses: the first that may operate, else the first."""
    return next((token for token in tokens if token.role == "operate"), tokens[0]).secret
