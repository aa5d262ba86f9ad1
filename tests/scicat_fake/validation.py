"""Strict checks of bodies: unknown keys, missing ones and wrong types, each with a message."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from tests.scicat_fake.errors import invalid
from tests.scicat_fake.state import Document, utc

__all__ = ["ANY", "BOOLEAN", "DATE", "INTEGER", "NUMBER", "OBJECT", "STRING", "STRINGS", "TEXT"]
__all__ += ["Field", "check", "files_checked", "required", "stored_files"]

_MESSAGES_AT_MOST = 50


class Field(NamedTuple):
    """What a field may hold: ``fits`` decides, ``phrase`` is the end of the message."""

    fits: Callable[[Any], bool]
    phrase: str
    required: bool = False


def _is_integer(value: object) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_date(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        datetime.fromisoformat(value)
    except ValueError:
        return False
    return True


ANY = Field(lambda _: True, "")
STRING = Field(lambda value: isinstance(value, str), "must be a string")
TEXT = Field(lambda value: isinstance(value, str) and value != "", "should not be empty")
INTEGER = Field(_is_integer, "must be an integer number")
NUMBER = Field(_is_number, "must be a number conforming to the specified constraints")
BOOLEAN = Field(lambda value: isinstance(value, bool), "must be a boolean value")
DATE = Field(_is_date, "must be a valid ISO 8601 date string")
OBJECT = Field(lambda value: isinstance(value, dict), "must be an object")
STRINGS = Field(
    lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    "each value in it must be a string",
)

_FILE_FIELDS: dict[str, Field] = {
    "path": STRING._replace(required=True),
    "size": NUMBER._replace(required=True),
    "time": DATE._replace(required=True),
    **dict.fromkeys(("chk", "uid", "gid", "perm", "type"), STRING),
    "metadata": OBJECT,
}


def required(field: Field) -> Field:
    return field._replace(required=True)


def _problems(body: Mapping[str, Any], fields: Mapping[str, Field], prefix: str = "") -> Iterator[str]:
    yield from (f"{prefix}property {key} should not exist" for key in body.keys() - fields.keys())
    for name, field in fields.items():
        value = body.get(name)
        if value is None:
            if field.required:
                yield f"{prefix}{name} {field.phrase}"
        elif not field.fits(value):
            yield f"{prefix}{name} {field.phrase}"


def check(body: object, fields: Mapping[str, Field], *, more: Iterable[str] = ()) -> Document:
    """The body, when it is an object that keeps to ``fields``.  Raises a 400 with all messages otherwise."""
    if not isinstance(body, dict):
        raise invalid(["an unknown value was passed to the validate function"])
    problems = [*_problems(body, fields), *more]
    if problems:
        raise invalid(sorted(problems))
    return body


def files_checked(body: object, *, empty_allowed: bool) -> Iterator[str]:
    """What is wrong with a ``dataFileList``."""
    files = body.get("dataFileList") if isinstance(body, dict) else None
    if not isinstance(files, list):
        yield "dataFileList must be an array"
        return
    if not files and not empty_allowed:
        yield "dataFileList should not be empty"
    count = 0
    for index, entry in enumerate(files):
        if not isinstance(entry, dict):
            problems = [f"dataFileList.{index} must be an object"]
        else:
            problems = list(_problems(entry, _FILE_FIELDS, f"dataFileList.{index}."))
        yield from problems
        count += len(problems)
        if count > _MESSAGES_AT_MOST:
            return


def stored_files(files: list[Document]) -> list[Document]:
    """As the database keeps them: times in UTC with milliseconds."""
    seen: dict[str, str] = {}  # a dataset has few distinct times, or as many as files
    stored = []
    for entry in files:
        time = entry["time"]
        if time not in seen:
            moment = datetime.fromisoformat(time)
            seen[time] = utc(moment)
        stored.append({**entry, "time": seen[time]})
    return stored
