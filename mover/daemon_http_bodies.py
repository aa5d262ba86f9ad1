"""Bodies of requests: decoded strictly; what is wrong is told with the field, its value and what is allowed."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, Final, TypeVar

import msgspec

from mover.api import JobKind, JobOptions, JobOrder
from mover.errors import HostileNameError
from mover.policies.names import check_dataset_id, check_path
from mover.tasks import in_turns

__all__ = [
    "BODY_LIMIT_BYTES",
    "OPTIONS_OF_KIND",
    "BodyError",
    "FieldError",
    "allowed_text",
    "check_order",
    "decode_body",
    "field_error",
]

T = TypeVar("T")

BODY_LIMIT_BYTES: Final = 4 << 20
"""Longest body of a request: ten thousand datasets, or as many files of one, fit into it."""

OPTIONS_OF_KIND: Final[dict[JobKind, tuple[str, ...]]] = {
    "archive": ("release_source", "registered"),
    "retrieve": ("files", "form"),
    "verify": ("level",),
    "plan": (),
}
"""The options that each kind of job has."""

FieldError = dict[str, str]
"""``field``, ``value`` (as JSON, cut) and ``allowed``."""

_SHOWN_CHARACTERS: Final = 200
_SHOWN_ERRORS: Final = 20
_UNREADABLE: Final = (msgspec.MsgspecError, UnicodeError, RecursionError)
_INDEX = re.compile(r"[0-9]{1,9}")
_AT = re.compile(r" - at `(?:key in )?\$(.*)`\Z")
_UNKNOWN_FIELD = re.compile(r"unknown field `(.*?)`")
_MISSING_FIELD = re.compile(r"missing required field `(.*?)`")


class BodyError(Exception):
    """A body that cannot be taken; the interface answers 400."""

    def __init__(self, detail: str, errors: tuple[FieldError, ...] = ()) -> None:
        self.detail, self.errors = detail, errors
        super().__init__(detail)


def decode_body(body: bytes, kind: type[T]) -> T:
    """The body as a struct; unknown fields are refused.  Raises BodyError."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        if "got `float`" in str(error) and b"." in body:  # JSON has one kind of number: 2.0 is a whole one
            with suppress(*_UNREADABLE):
                return msgspec.convert(_with_whole_numbers(msgspec.json.decode(body)), kind)
        raise BodyError(*_explained(str(error), body, kind)) from error
    except _UNREADABLE as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        detail = f"the body is no JSON: {reason}"
        raise BodyError(detail) from error


def _with_whole_numbers(document: Any) -> Any:  # noqa: ANN401 - JSON
    if isinstance(document, dict):
        return {name: _with_whole_numbers(value) for name, value in document.items()}
    if isinstance(document, list):
        return [_with_whole_numbers(value) for value in document]
    return int(document) if isinstance(document, float) and document.is_integer() else document


def field_error(field: str, value: object, allowed: str) -> FieldError:
    """One thing that is wrong."""
    try:
        shown = msgspec.json.encode(value).decode()
    except (msgspec.MsgspecError, TypeError, ValueError):
        shown = repr(value)
    if len(shown) > _SHOWN_CHARACTERS:
        shown = shown[:_SHOWN_CHARACTERS] + " ..."
    return {"field": field, "value": shown, "allowed": allowed}


async def check_order(order: JobOrder) -> None:
    """Lets an order pass that can mean something.  Raises BodyError, with everything that is wrong."""
    errors = []
    async for error in _order_errors(order):
        errors.append(error)
        if len(errors) == _SHOWN_ERRORS:
            break
    if errors:
        first = errors[0]
        detail = f"{first['field']} is {first['value']}: allowed is {first['allowed']}"
        raise BodyError(detail, tuple(errors))


async def _order_errors(order: JobOrder) -> AsyncIterator[FieldError]:
    async for index, dataset_id in in_turns(enumerate(order.dataset_ids)):
        try:
            check_dataset_id(dataset_id)
        except HostileNameError as error:
            yield field_error(f"dataset_ids[{index}]", dataset_id, f"a PID that can be archived: {error.reason}")
    allowed = OPTIONS_OF_KIND[order.kind]
    default = JobOptions()
    for name in JobOptions.__struct_fields__:
        value = getattr(order.options, name)
        if name not in allowed and value != getattr(default, name):
            homes = [kind for kind, names in OPTIONS_OF_KIND.items() if name in names]
            yield field_error(f"options.{name}", value, f"no value with kind {order.kind!r}, only with {homes[0]!r}")
    if order.options.files and len(order.dataset_ids) > 1:
        yield field_error("options.files", order.options.files, "no value with more than one dataset")
    async for index, path in in_turns(enumerate(order.options.files)):
        try:
            check_path(path.removesuffix("/"))
        except HostileNameError as error:
            yield field_error(f"options.files[{index}]", path, f"the path of a file or folder: {error.reason}")


def _explained(message: str, body: bytes, kind: type[Any]) -> tuple[str, tuple[FieldError, ...]]:
    at = _AT.search(message)
    path = at.group(1).removeprefix(".") if at else ""
    said = message[: at.start()] if at else message
    unknown, missing = _UNKNOWN_FIELD.search(said), _MISSING_FIELD.search(said)
    named = unknown or missing
    field = ".".join(part for part in (path, named.group(1) if named else "") if part)
    value = _value_at(body, field)
    if unknown:
        allowed = "one of the fields " + ", ".join(_properties(kind, path))
        return f"{field} is no field here", (field_error(field, value, allowed),)
    allowed = allowed_text(_schema_at(kind, field)) or said
    if missing:
        return f"{field} is missing", ({"field": field, "value": "", "allowed": allowed},)
    return f"{field or 'the body'}: {said}", (field_error(field, value, allowed),)


def _steps(field: str) -> list[str]:
    return re.findall(r"[^.\[\]]+|\[\.\.\.\]", field)


def _value_at(body: bytes, field: str) -> object:
    """What stands there; nothing when it cannot be told, as with an index that the message leaves out."""
    try:
        document = msgspec.json.decode(body)
    except _UNREADABLE:
        return None
    for step in _steps(field):
        if isinstance(document, dict) and step in document:
            document = document[step]
        elif isinstance(document, list) and _INDEX.fullmatch(step) and int(step) < len(document):
            document = document[int(step)]
        else:
            return None
    return document


def _schema(kind: type[Any]) -> dict[str, Any]:
    return msgspec.json.schema(kind)


def _resolved(kind: type[Any], node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node or "anyOf" in node:
        if "$ref" in node:
            node = _schema(kind)["$defs"][node["$ref"].rpartition("/")[2]]
        else:
            node = next((item for item in node["anyOf"] if item != {"type": "null"}), {})
    return node


def _schema_at(kind: type[Any], field: str) -> dict[str, Any]:
    node = _resolved(kind, _schema(kind))
    for step in _steps(field):
        inner = node.get("properties", {}).get(step, node.get("items", {}))
        node = _resolved(kind, inner) if isinstance(inner, dict) else {}
    return node


def _properties(kind: type[Any], path: str) -> list[str]:
    return list(_schema_at(kind, path).get("properties", {}))


def allowed_text(node: dict[str, Any]) -> str:
    """What a schema allows, in words."""
    if "anyOf" in node:
        return " or ".join(allowed_text(item) for item in node["anyOf"])
    if "enum" in node:
        names = [str(item) or "''" for item in node["enum"]]
        return f"one of {', '.join(names)}" if len(names) > 1 else names[0]
    words = {"integer": "a whole number", "string": "a text", "array": "a list", "boolean": "true or false"}
    text = words.get(str(node.get("type")), "an object" if "properties" in node else "")
    bounds = (("minimum", "maximum", ""), ("minLength", "maxLength", " long"), ("minItems", "maxItems", " entries"))
    for low, high, unit in bounds:
        if low in node or high in node:
            text += (
                f", {node.get(low, 0):,} to {node.get(high, 'any number'):,}{unit}"
                if high in node
                else (f", {node[low]:,} or more{unit}")
            )
    return f"{text}, in the form {node['pattern']}" if "pattern" in node else text
