"""The daemon's journal: what was accepted and what became of it, in one SQLite file that survives a power cut.

One task owns the one connection that writes. All requests that wait are committed together, so a burst of a thousand
costs a few syncs of the disk and not a thousand. Readers have connections of their own and never wait for the writer.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import socket
import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import anyio
import anyio.to_thread

from mover.daemon_priority import prompt_executor
from mover.daemon_store_schema import SCHEMA, SCHEMA_VERSION
from mover.errors import DaemonRunningError, JournalError, MoverError
from mover.parts import now_iso
from mover.streams.durable import make_folder_durably, sync_folder
from mover.tasks import open_task_group

__all__ = ["Pending", "Store"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

_READERS: Final = 2
_BATCH: Final = 256  # requests that are committed together at most: the first ones need not wait for thousands
_BUSY_TIMEOUT_S: Final = 5.0  # somebody looks at the file with sqlite3, or copies it
_APPLICATION_ID: Final = 0x6D6F7672
_FREED_PAGES: Final = 2_000  # given back to the file system in one step


class Pending:
    """A step on its way into the journal."""

    def __init__(self, step: Callable[[sqlite3.Connection], Any]) -> None:
        self.step = step
        self.result: Any = None
        self.error: Exception | None = None
        self.done = anyio.Event()

    async def wait(self) -> None:
        """Until it is durable.  Raises JournalError when it is not and will not be, and what the step raised."""
        await self.done.wait()
        if self.error is not None:
            raise self.error


class Store:
    """Open it with :meth:`open`. A step is a function of ``daemon_store_rows``, with its arguments bound."""

    def __init__(self, path: Path, writer: sqlite3.Connection, readers: Sequence[sqlite3.Connection]) -> None:
        self.path = path
        self.error = ""
        """Why the last write failed; '' when it did not."""
        self._writer, self._readers = writer, list(readers)
        self._requests: deque[Pending] = deque()
        self._wake = anyio.Event()
        self._read_limit = anyio.CapacityLimiter(len(readers))
        self._closing = False

    @classmethod
    @asynccontextmanager
    async def open(cls, folder: Path) -> AsyncIterator[Store]:
        """The journal in ``folder``, which is made when missing; no other process can open it meanwhile.

        Raises:
            DaemonRunningError: another process has it open.
            JournalError: it cannot be used: permissions, a damaged file, one of a newer version.
        """
        path = folder / "jobs.sqlite"
        lock = await anyio.to_thread.run_sync(_locked, folder)
        try:
            connections = await anyio.to_thread.run_sync(_connections, path)
            store = cls(path, connections[0], connections[1:])
            try:
                async with open_task_group() as tasks:
                    tasks.start_soon(store._commit_requests)
                    try:
                        yield store
                    finally:
                        store._close_intake()
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(_close, connections)
        finally:
            os.close(lock)

    async def write(self, step: Callable[[sqlite3.Connection], T]) -> T:
        """Commits a step; it is durable when this returns. A caller that is cancelled does not undo it.

        Raises:
            JournalError: it could not be committed; nothing of it was.
            MoverError: what the step raised.
        """
        request = self.enqueue(step)
        await request.wait()
        result: T = request.result
        return result

    def enqueue(self, step: Callable[[sqlite3.Connection], Any]) -> Pending:
        """As ``write``, without the waiting: steps are committed in the order in which they were enqueued."""
        if self._closing:
            raise JournalError(str(self.path), "closed")
        request = Pending(step)
        self._requests.append(request)
        self._wake.set()
        return request

    async def read(self, step: Callable[[sqlite3.Connection], T]) -> T:
        """What a step finds; it sees everything that was committed before.  Raises JournalError, and what it raises."""
        async with self._read_limit:
            connection = self._readers.pop()
            try:
                return await anyio.to_thread.run_sync(self._read, connection, step)
            finally:
                self._readers.append(connection)

    def _read(self, connection: sqlite3.Connection, step: Callable[[sqlite3.Connection], T]) -> T:
        try:
            connection.execute("BEGIN")  # one moment for all of the step's questions
            try:
                return step(connection)
            finally:
                connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            raise JournalError(str(self.path), _reason(error)) from error

    def _close_intake(self) -> None:
        self._closing = True
        self._wake.set()

    async def _commit_requests(self) -> None:
        loop = asyncio.get_running_loop()
        # it ends by `_close_intake`, after the last request
        with anyio.CancelScope(shield=True), prompt_executor("journal") as thread:
            while True:
                await self._wake.wait()
                self._wake = anyio.Event()
                while self._requests:
                    batch = [self._requests.popleft() for _ in range(min(_BATCH, len(self._requests)))]
                    await loop.run_in_executor(thread, self._commit, batch)
                    for request in batch:
                        request.done.set()
                if self._closing:
                    return

    def _commit(self, batch: list[Pending]) -> None:
        """Commits all together; where that fails each by itself, so that one does not take the others with it."""
        failed = self._transact(batch)
        if failed is not None and len(batch) > 1:
            for request in batch:
                request.error = self._transact([request]) or request.error
        elif failed is not None:
            batch[0].error = failed
        reasons = [request.error.reason for request in batch if isinstance(request.error, JournalError)]
        if reasons and not self.error:
            _log.error("the journal %s cannot be written: %s", self.path, reasons[0])
        self.error = reasons[0] if reasons else ""

    def _transact(self, batch: list[Pending]) -> Exception | None:
        connection = self._writer
        try:
            connection.execute("BEGIN IMMEDIATE")
            for request in batch:
                request.error = None
                try:
                    request.result = request.step(connection)
                except MoverError as error:  # it has written nothing
                    request.error = error
            connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            with suppress(sqlite3.Error):
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            if not isinstance(error, sqlite3.Error):
                return error
            told = JournalError(str(self.path), _reason(error))
            told.__cause__ = error
            return told
        return None

    async def give_back(self) -> None:
        """Gives pages that are free after a trim back to the file system, a bounded number.  Raises JournalError."""
        await self.write(_vacuum)


def _vacuum(connection: sqlite3.Connection) -> None:
    connection.execute(f"PRAGMA incremental_vacuum({_FREED_PAGES})").fetchall()


def _reason(error: sqlite3.Error) -> str:
    """``SQLITE_FULL: database or disk is full``."""
    name = getattr(error, "sqlite_errorname", "")
    return f"{name}: {error}" if name else str(error)


def _locked(folder: Path) -> int:
    """The descriptor that holds the folder, as long as it is open."""
    path = folder / "lock"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        make_folder_durably(folder, below=folder.parent)
        folder.chmod(0o700)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{socket.gethostname()}, process {os.getpid()}, since {now_iso()}".encode(), 0)
        except BlockingIOError as error:
            holder = os.pread(lock, 4096, 0).decode("utf-8", "replace") or "a process that does not say"
            os.close(lock)
            raise DaemonRunningError(str(folder), holder) from error
        except OSError:
            os.close(lock)
            raise
    except OSError as error:
        raise JournalError(str(path), error.strerror or str(error)) from error
    return lock


def _connections(path: Path) -> list[sqlite3.Connection]:
    """The writer, then the readers."""
    connections: list[sqlite3.Connection] = []
    try:
        # before SQLite sees it: the files beside it get the same permissions
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        for _ in range(1 + _READERS):
            connection = sqlite3.connect(
                path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, cached_statements=64
            )
            connections.append(connection)
            if len(connections) == 1:
                _prepare(connection, path)
            else:
                connection.execute("PRAGMA query_only = ON")
        sync_folder(path.parent)
    except (OSError, sqlite3.Error, JournalError) as error:
        for connection in connections:
            connection.close()
        if isinstance(error, JournalError):
            raise
        reason = _reason(error) if isinstance(error, sqlite3.Error) else error.strerror or str(error)
        raise JournalError(str(path), reason) from error
    return connections


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise JournalError(str(path), f"version {version}; this program knows {SCHEMA_VERSION}")
    if not version:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise JournalError(str(path), f"the file system allows no write-ahead log (mode {mode!r})")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA journal_size_limit = {64 << 20}")
    found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise JournalError(str(path), f"damaged: {found}")
    if not version:
        begin = f"BEGIN; {SCHEMA} PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION};"
        connection.executescript(f"{begin} COMMIT;")


def _close(connections: Sequence[sqlite3.Connection]) -> None:
    for connection in reversed(connections):
        with suppress(sqlite3.Error):  # everything is committed; closing only tidies up
            if connection is connections[0]:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            connection.close()
