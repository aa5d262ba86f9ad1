"""Documents, tokens and history in a file: a change is there before its request is answered, and after any end.

SQLite is told each document by itself, so that a change of one costs the same in a catalogue of any size on disk. What
has changed is found by comparing with what was written last: no handler has to say it, none can forget to. Accounts,
switches and faults are the process's own: they come from its command line and its controls.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from tests.scicat_fake.state import Change, Document, State

__all__ = ["Keeper"]

_SCHEMA = "CREATE TABLE IF NOT EXISTS kept (kind TEXT, key TEXT, body BLOB NOT NULL, PRIMARY KEY (kind, key))"
# An order within a kind is the order in which its documents came, which an update does not change.
_PUT = "INSERT INTO kept VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET body = excluded.body"
_DROP = "DELETE FROM kept WHERE kind = ? AND key = ?"
_FINAL = frozenset({"origdatablock", "datablock", "change"})  # come and go, but stay as they are

_Name = tuple[str, str]


class Keeper:
    """A file for the state of one server; nobody else may have it open."""

    def __init__(self, file: Path) -> None:
        """Opens the file, or makes it, for its owner only.

        Raises:
            sqlite3.Error: another process has it, or it is something else.
        """
        file.touch(mode=0o600)
        self._database = sqlite3.connect(file, timeout=1, isolation_level=None, check_same_thread=False)
        for statement in ("PRAGMA locking_mode = EXCLUSIVE", "PRAGMA synchronous = EXTRA", _SCHEMA, "BEGIN EXCLUSIVE"):
            self._database.execute(statement)
        self._database.execute("COMMIT")
        self._writing = asyncio.Lock()
        self._of: State | None = None
        self._written: dict[_Name, bytes] = {}

    def close(self) -> None:
        self._database.close()

    def load(self, state: State) -> None:
        """Puts what the file has into an empty state."""
        for kind, key, body in self._database.execute("SELECT kind, key, body FROM kept ORDER BY rowid"):
            _put_back(state, kind, key, body)
            self._written[kind, key] = b"" if kind in _FINAL else body
        self._of = state

    async def keep(self, current: Callable[[], State]) -> None:
        """Returns when all that the state has now is durable.  Raises sqlite3.Error when it cannot be."""
        async with self._writing:  # what waits here is written by the next one, in one transaction
            state = current()
            another = state is not self._of  # after a reset the same keys are other things
            puts, seen = [], set()
            for kind, key, value in _rows(state):
                seen.add((kind, key))
                known = None if another else self._written.get((kind, key))
                if known is None or kind not in _FINAL:
                    body = msgspec.json.encode(value)
                    if body != known:
                        puts.append((kind, key, body))
            drops = [name for name in self._written if name not in seen]
            if puts or drops:
                await asyncio.to_thread(self._write, puts, drops)
            self._of = state

    def _write(self, puts: list[tuple[str, str, bytes]], drops: list[_Name]) -> None:
        with self._database:  # commits, or takes all of it back
            self._database.execute("BEGIN")
            self._database.executemany(_DROP, drops)
            self._database.executemany(_PUT, puts)
        for name in drops:
            del self._written[name]
        self._written.update({(kind, key): b"" if kind in _FINAL else body for kind, key, body in puts})


def _rows(state: State) -> Iterator[tuple[str, str, object]]:
    yield "tokens", "key", state.token_key
    yield "tokens", "epoch", state.token_epoch
    for pid, dataset in state.datasets.items():
        yield "dataset", pid, dataset
    for kind, by_dataset in (("origdatablock", state.orig_datablocks), ("datablock", state.datablocks)):
        for blocks in by_dataset.values():
            for block_id, block in blocks.items():
                yield kind, block_id, block
    for job_id, job in state.jobs.items():
        yield "job", job_id, job
    for number, change in enumerate(state.history, state.remembered - len(state.history)):
        yield "change", str(number), change


def _put_back(state: State, kind: str, key: str, body: bytes) -> None:
    if kind == "change":
        state.history.append(msgspec.json.decode(body, type=Change))
        state.remembered = int(key) + 1
        return
    value: Any = msgspec.json.decode(body)
    match kind, key:
        case "tokens", "key":
            state.token_key = value
        case "tokens", _:
            state.token_epoch = value
        case "dataset", _:
            state.datasets[key] = value
        case "job", _:
            state.jobs[key] = value
        case "origdatablock", _:
            _put_block(state.orig_datablocks, value)
        case "datablock", _:
            _put_block(state.datablocks, value)
            state.archive_ids[value["archiveId"]] = value["datasetId"]


def _put_block(by_dataset: dict[str, dict[str, Document]], block: Document) -> None:
    by_dataset.setdefault(block["datasetId"], {})[block["_id"]] = block
