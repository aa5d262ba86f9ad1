"""What is written to the daemon's journal and read there in one step. Everything here blocks.

A step raises before it writes, or writes whole. Values are bound; what is put into the text of a query are names that
stand in this file.
"""

# ruff: noqa: S608

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal

import msgspec

from mover.api import Failure, JobOptions
from mover.daemon_store_schema import Changes, ItemRow, JobRow, NewJob, TransitionRow
from mover.errors import KeyConflictError, UnknownJobError

__all__ = [
    "check",
    "find_key",
    "insert_job",
    "read_ended",
    "read_item",
    "read_items",
    "read_job",
    "read_jobs",
    "read_newest_id",
    "read_reports",
    "read_transitions",
    "read_unfinished",
    "request_cancel",
    "trim",
    "write_changes",
]

_JOB: Final = (
    "id, kind, owner, priority, options, accepted_ms, changed_ms, state, reason, key, catalogue_job, cancelled_by,"
    " last_number"
)
_ITEM: Final = "job_id, position, dataset_id, state, reason, attempt, failures, retry_ms, failure, outcome, number"
_TRANSITION: Final = "job_id, number, at_ms, state, dataset_id, reason, job_state"
_NEWEST: Final = "\x7f"  # after every id


def insert_job(connection: sqlite3.Connection, new: NewJob) -> str:
    """Accepts a job, in state queued; returns its id, or that of the one which the caller's key belongs to.

    Raises:
        KeyConflictError: the key belongs to another order.
    """
    row = new.row
    known = find_key(connection, new.caller, row.key, new.digest)
    if known:
        return known
    values = (*msgspec.structs.astuple(row)[:4], _json(row.options), *msgspec.structs.astuple(row)[5:])
    connection.execute(f"INSERT INTO jobs VALUES ({_marks(15)})", (*values, new.caller, new.digest))
    connection.executemany(
        "INSERT INTO items VALUES (?, ?, ?, 'queued', '', 0, 0, 0, '', '', 0)",
        [(row.id, position, dataset_id) for position, dataset_id in enumerate(new.dataset_ids)],
    )
    first = (row.id, row.last_number, row.accepted_ms, "queued", "", "", "queued")
    connection.execute(f"INSERT INTO transitions VALUES ({_marks(7)})", first)
    return row.id


def find_key(connection: sqlite3.Connection, caller: str, key: str, digest: bytes) -> str:
    """Id of the job that the caller's key belongs to; ''.  Raises KeyConflictError when that is another order."""
    if not key:
        return ""
    # the last condition is what lets the index be used, which has keys that are not empty
    query = "SELECT id, digest FROM jobs WHERE caller = ? AND key = ? AND key <> ''"
    found = connection.execute(query, (caller, key)).fetchone()
    if found is None:
        return ""
    if found[1] != digest:
        raise KeyConflictError(key, found[0])
    return str(found[0])


def write_changes(connection: sqlite3.Connection, changes: Changes) -> None:
    """Records what became of datasets, and of the job."""
    connection.execute(
        "UPDATE jobs SET state = ?1, reason = ?2, changed_ms = ?3, last_number = ?4"
        " WHERE id = ?5 AND last_number <= ?4",
        (changes.state, changes.reason, changes.changed_ms, changes.last_number, changes.job_id),
    )
    connection.executemany(
        "UPDATE items SET number = ?3, state = ?4, reason = ?5, attempt = ?6, failures = ?7, retry_ms = ?8,"
        " failure = ?9, outcome = ?10 WHERE job_id = ?1 AND position = ?2 AND number <= ?3",
        [
            (
                *(item.job_id, item.position, item.number, item.state, item.reason, item.attempt, item.failures),
                *(item.retry_ms, "" if item.failure is None else _json(item.failure), item.outcome),
            )
            for item in changes.items
        ],
    )
    connection.executemany(
        f"INSERT INTO transitions VALUES ({_marks(7)})", [msgspec.structs.astuple(row) for row in changes.transitions]
    )
    if changes.report:
        connection.execute(
            "INSERT OR REPLACE INTO reports VALUES (?, ?, ?, ?)",
            (changes.job_id, changes.items[0].position, changes.report_bytes, changes.report),
        )


def request_cancel(connection: sqlite3.Connection, job_id: str, who: str) -> None:
    """Keeps that somebody wants the job ended, so that no restart takes it up again."""
    connection.execute("UPDATE jobs SET cancelled_by = ? WHERE id = ? AND cancelled_by = ''", (who, job_id))


def read_job(connection: sqlite3.Connection, job_id: str) -> JobRow:
    """One job.  Raises UnknownJobError."""
    for row in connection.execute(f"SELECT {_JOB} FROM jobs WHERE id = ?", (job_id,)):
        return _job(row)
    raise UnknownJobError(job_id)


def read_items(connection: sqlite3.Connection, job_id: str, paths: int = 0) -> list[ItemRow]:
    """All datasets of a job, in its order; about so many of the files that failures name, all of one's or none."""
    items = []
    for row in connection.execute(f"SELECT {_ITEM} FROM items WHERE job_id = ? ORDER BY position", (job_id,)):
        items.append(item := _item(row, with_paths=paths > 0))
        if item.failure is not None:
            paths -= len(item.failure.missing) + len(item.failure.wrong_size)
    return items


def read_item(connection: sqlite3.Connection, job_id: str, dataset_id: str) -> ItemRow:
    """One dataset of a job.  Raises UnknownJobError."""
    query = f"SELECT {_ITEM} FROM items WHERE dataset_id = ? AND job_id = ?"
    for row in connection.execute(query, (dataset_id, job_id)):
        return _item(row)
    raise UnknownJobError(job_id)


def read_reports(
    connection: sqlite3.Connection, job_id: str, at_most_bytes: int, position: int | None = None
) -> Iterator[tuple[int, bytes]]:
    """Positions and JSON of reports, as long as they come to at most so many bytes; the first one always."""
    query, left_bytes, first = "SELECT position, size_bytes, body FROM reports WHERE job_id = ?", at_most_bytes, True
    arguments: tuple[Any, ...] = (job_id,)
    if position is not None:
        query, arguments = f"{query} AND position = ?", (job_id, position)
    for found, size_bytes, body in connection.execute(f"{query} ORDER BY position", arguments):
        left_bytes -= size_bytes
        if left_bytes < 0 and not first:
            return
        first = False
        yield found, zlib.decompress(body)


def read_ended(connection: sqlite3.Connection, job_id: str, at_most_bytes: int) -> tuple[list[ItemRow], list[bytes]]:
    """All datasets of a job, and their reports as far as they go."""
    return read_items(connection, job_id), [body for _, body in read_reports(connection, job_id, at_most_bytes)]


def read_transitions(
    connection: sqlite3.Connection, job_id: str, after: int = 0, limit: int = -1
) -> list[TransitionRow]:
    """Changes with numbers above ``after``, oldest first."""
    query = f"SELECT {_TRANSITION} FROM transitions WHERE job_id = ? AND number > ? ORDER BY number LIMIT ?"
    return [TransitionRow(*row) for row in connection.execute(query, (job_id, after, limit))]


def read_jobs(
    connection: sqlite3.Connection, where: Sequence[tuple[str, str]], before: str, limit: int
) -> Iterator[tuple[JobRow, list[ItemRow]]]:
    """Jobs, newest first, with their datasets, one by one: together they may be more than memory should hold.

    ``where``: columns ``state``, ``owner``, ``dataset_id`` and their values.
    """
    names = [name for name, _ in where]
    source = "items JOIN jobs ON jobs.id = items.job_id" if "dataset_id" in names else "jobs"
    key = "items.job_id" if "dataset_id" in names else "jobs.id"
    columns = ", ".join(f"jobs.{name}" for name in _JOB.replace(" ", "").split(","))
    conditions = " AND ".join([f"{key} < ?", *(f"{_QUALIFIED[name]} = ?" for name in names)])
    query = f"SELECT {columns} FROM {source} WHERE {conditions} ORDER BY {key} DESC LIMIT ?"
    for row in connection.execute(query, (before or _NEWEST, *(value for _, value in where), limit)):
        yield _job(row), read_items(connection, row[0])


_QUALIFIED: Final = {"state": "jobs.state", "owner": "jobs.owner", "dataset_id": "items.dataset_id"}


def read_unfinished(connection: sqlite3.Connection) -> list[tuple[JobRow, list[ItemRow]]]:
    """All jobs that have not ended, with all their datasets, oldest first."""
    query = f"SELECT {_JOB} FROM jobs WHERE state IN ('queued', 'waiting', 'running') ORDER BY id"
    return [(_job(row), read_items(connection, row[0])) for row in connection.execute(query).fetchall()]


def read_newest_id(connection: sqlite3.Connection) -> str:
    """The last id that was given; ''."""
    return str(connection.execute("SELECT coalesce(max(id), '') FROM jobs").fetchone()[0])


def check(connection: sqlite3.Connection) -> None:
    """Writes something that changes nothing."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    connection.execute(f"PRAGMA user_version = {int(version)}")


def trim(connection: sqlite3.Connection, before_ms: int, datasets: int) -> int:
    """Forgets the oldest jobs that ended before, about so many datasets' worth of them; returns how many jobs."""
    query = (
        "SELECT id, (SELECT count(*) FROM items WHERE job_id = id) FROM jobs"
        " WHERE state IN ('done', 'failed', 'cancelled') AND changed_ms < ? ORDER BY changed_ms"
    )
    ids: list[tuple[str]] = []
    for job_id, count in connection.execute(query, (before_ms,)):
        ids.append((job_id,))
        datasets -= count
        if datasets <= 0:
            break
    for table, column in (("reports", "job_id"), ("transitions", "job_id"), ("items", "job_id"), ("jobs", "id")):
        connection.executemany(f"DELETE FROM {table} WHERE {column} = ?", ids)
    return len(ids)


def _job(row: tuple[Any, ...]) -> JobRow:
    values: list[Any] = [*row[:4], msgspec.json.decode(row[4], type=JobOptions), *row[5:]]
    return JobRow(*values)


class _Reason(msgspec.Struct):
    """A failure without the files that it names."""

    kind: str
    message: str
    exit_code: int
    retryable: bool
    fault: Literal["user", "system"]


def _item(row: tuple[Any, ...], *, with_paths: bool = True) -> ItemRow:
    failure = None
    if row[8] and with_paths:
        failure = msgspec.json.decode(row[8], type=Failure)
    elif row[8]:
        failure = Failure(*msgspec.structs.astuple(msgspec.json.decode(row[8], type=_Reason)))
    values: list[Any] = [*row[:8], failure, *row[9:]]
    return ItemRow(*values)


def _json(value: msgspec.Struct) -> str:
    return msgspec.json.encode(value).decode()


def _marks(number: int) -> str:
    return ", ".join("?" * number)
