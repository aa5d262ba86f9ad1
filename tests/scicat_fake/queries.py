"""Filters of lists: conditions, order, limits and fields, in both spellings (Mongo's and the older LoopBack's)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import msgspec

from tests.scicat_fake.errors import http_error, internal_error
from tests.scicat_fake.state import Document, State, utc

__all__ = ["LIST_CAP", "Limits", "check_filter_keys", "limits_of", "parsed", "projected", "selected", "where_matches"]

LIST_CAP = 100
_FILTER_KEYS = frozenset(("where", "include", "fields", "limits", "limit", "skip", "sort"))
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda value, wanted: bool(value == wanted or (isinstance(value, list) and wanted in value)),
    "ne": lambda value, wanted: bool(value != wanted),
    "in": lambda value, wanted: any(item in wanted for item in value) if isinstance(value, list) else value in wanted,
    "nin": lambda value, wanted: value not in wanted,
    "gt": lambda value, wanted: value is not None and bool(value > wanted),
    "gte": lambda value, wanted: value is not None and bool(value >= wanted),
    "lt": lambda value, wanted: value is not None and bool(value < wanted),
    "lte": lambda value, wanted: value is not None and bool(value <= wanted),
    "exists": lambda value, wanted: (value is not None) == bool(wanted),
}
_OTHER_NAMES = {"inq": "in", "neq": "ne"}
_DATE = re.compile(r"\d{4}-\d\d-\d\d(T[\d:.]+(Z|[+-]\d\d:?\d\d)?)?\Z")


class Limits(msgspec.Struct, frozen=True):
    """Which rows of a list; ``order``: names of fields with True where they descend."""

    limit: int
    skip: int = 0
    order: tuple[tuple[str, bool], ...] = ()


def parsed(text: str | None) -> Document:
    """A query parameter that holds a JSON object; nothing sent is an empty one."""
    if not text:
        return {}
    try:
        value = msgspec.json.decode(text.encode())
    except msgspec.DecodeError as error:
        raise http_error(400, f"Invalid JSON in filter: {error}") from error
    if not isinstance(value, dict):
        raise http_error(400, "Invalid JSON in filter")
    return value


def limits_of(limits: Document | None, default: int = LIST_CAP) -> Limits:
    limits = limits or {}
    try:
        limit, skip = int(limits.get("limit") or default), int(limits.get("skip") or 0)
    except (TypeError, ValueError):
        raise internal_error() from None
    return Limits(limit, skip, tuple(_order(limits)))


def _order(limits: Document) -> Iterator[tuple[str, bool]]:
    sort, order = limits.get("sort"), limits.get("order")
    if isinstance(sort, dict):
        yield from ((name, direction in {"desc", -1, "-1"}) for name, direction in sort.items())
    elif isinstance(order, str) and order:
        for part in order.split(","):
            name, _, direction = part.strip().replace(" ", ":").partition(":")
            yield name, direction.lower() == "desc"


def check_filter_keys(wanted: Document, fields: frozenset[str]) -> None:
    """The newer lists refuse keys that neither the filter nor the document has: 400."""
    allowed = _FILTER_KEYS | fields | {"and", "or", "regex", "options", *_OPERATORS}
    for path in _key_paths(wanted):
        parts = path.split(".")
        if not all(part.removeprefix("$") in allowed for part in parts):
            raise http_error(400, f"Property {path} should not exist in the filter object")


def _key_paths(value: Document, prefix: str = "") -> Iterator[str]:
    for key, inner in value.items():
        path = f"{prefix}{key}"
        if isinstance(inner, dict) and inner:
            yield from _key_paths(inner, f"{path}.")
        else:
            yield path


def _value(document: Mapping[str, Any], path: str) -> Any:  # noqa: ANN401 - documents hold any JSON
    value: Any = document
    for index, part in enumerate(parts := path.split(".")):
        if isinstance(value, list):
            rest = ".".join(parts[index:])
            return [_value(item, rest) for item in value if isinstance(item, dict)]
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value


def _as_stored(wanted: Any) -> Any:  # noqa: ANN401
    if isinstance(wanted, str) and _DATE.match(wanted) and "T" in wanted:
        return utc(datetime.fromisoformat(wanted))
    return wanted


def where_matches(document: Mapping[str, Any], where: Document) -> bool:
    for key, wanted in where.items():
        if key in {"$and", "and"}:
            matches = all(where_matches(document, part) for part in wanted)
        elif key in {"$or", "or"}:
            matches = any(where_matches(document, part) for part in wanted)
        else:
            matches = _field_matches(_value(document, key), wanted)
        if not matches:
            return False
    return True


def _field_matches(value: Any, wanted: Any) -> bool:  # noqa: ANN401
    if not isinstance(wanted, dict):
        return _OPERATORS["eq"](value, _as_stored(wanted))
    flags = re.IGNORECASE if "i" in str(wanted.get("$options", wanted.get("options", ""))) else 0
    for key, operand in wanted.items():
        name = _OTHER_NAMES.get(key.removeprefix("$"), key.removeprefix("$"))
        if name == "options":
            continue
        if name in {"regex", "like"}:
            matches = isinstance(value, str) and re.search(str(operand), value, flags) is not None
        elif name in _OPERATORS:
            matches = _OPERATORS[name](value, _as_stored(operand))
        else:
            raise internal_error()
        if not matches:
            return False
    return True


def selected(
    state: State, documents: Iterable[Document], where: Document, limits: Limits, *, limit_first: bool = False
) -> list[Document]:
    """The rows that a list answers; ``limit_first``: counts the limit before the skipped rows, as jobs do."""
    rows = [document for document in documents if where_matches(document, where)] if where else list(documents)
    for name, descending in reversed(limits.order):
        rows.sort(key=lambda row: str(_value(row, name) or ""), reverse=descending)
    if not limits.order and state.switches.unstable_order and rows:
        state.unordered_lists += 1
        start = state.unordered_lists % len(rows)
        rows = rows[start:] + rows[:start]
    if limit_first:
        return rows[: limits.limit][limits.skip :]
    return rows[limits.skip : limits.skip + limits.limit]


def projected(documents: list[Document], fields: object) -> list[Document]:
    """The wanted fields of each document; all of them when none are named."""
    names = [name for name, kept in fields.items() if kept] if isinstance(fields, dict) else fields
    if not isinstance(names, list) or not names:
        return documents
    return [{name: document[name] for name in ("_id", *names) if name in document} for document in documents]
