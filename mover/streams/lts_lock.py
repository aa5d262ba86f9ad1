"""One run at a time per dataset: flock where the mount has it, a lease file where it does not. Everything here blocks.

flock is held by an open file: the kernel lets it go with the process, however that ends, and NFS carries it to the
server as a lock of the whole file, so it holds between hosts. The lock file stays for ever: deleting it would let a
third run lock a new file while a second one waits for the old.

The lease is weaker and only for mounts without locks: a file created exclusively, whose age must stay below
``LEASE_EXPIRY_S`` by ``refresh``. Ages are measured by the server's clock alone. A run that is suspended for longer
loses the dataset, and learns it from ``refresh`` before it commits; so callers refresh before each commit.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from mover.errors import DatasetBusyError, LtsError
from mover.streams.durable import rename_file
from mover.streams.lts_mount import MountProfile, translate_lts

__all__ = ["LEASE_EXPIRY_S", "LEASE_REFRESH_S", "DatasetLock", "lock_dataset"]

LEASE_REFRESH_S = 30.0
"""How often a holder calls ``refresh``, in seconds."""

LEASE_EXPIRY_S = 300.0
"""Age in seconds after which a lease counts as left behind."""

_HOLDER_BYTES = 4096


class _Grip(Protocol):
    """What holds the dataset: a lock or a lease."""

    def held(self) -> bool: ...

    def release(self) -> None: ...


class DatasetLock:
    """A held dataset; a context manager that lets it go. ``holder`` is the text that others are shown."""

    def __init__(self, grip: _Grip, path: Path, holder: str) -> None:
        self._grip = grip
        self._path = path
        self._released = False
        self.holder = holder

    def refresh(self) -> None:
        """Proves that the dataset is still held, and for a lease prolongs it. Blocking.

        To be called every ``LEASE_REFRESH_S`` seconds and before each commit.

        Raises:
            LtsError: the lock is lost, so the run has to stop.
        """
        with translate_lts("lock", self._path):
            held = not self._released and self._grip.held()
        if not held:
            raise LtsError("lock", str(self._path), "the lock is lost; another run may hold the dataset")

    def release(self) -> None:
        """Lets the dataset go; twice is fine. Blocking."""
        if not self._released:
            self._released = True
            with suppress(OSError):
                self._grip.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def lock_dataset(folder: Path, dataset_id: str, holder: str, profile: MountProfile) -> DatasetLock:
    """Takes the dataset whose files are in ``folder``, without waiting. Blocking.

    Raises:
        DatasetBusyError: another run holds it; names the holder.
        LtsError: the mount fails, or has neither locks nor what a lease needs.
    """
    if profile.locks:
        path = folder / ".lock"
        with translate_lts("lock", path):
            return DatasetLock(_FileLock(path, dataset_id, holder), path, holder)
    path = folder / ".lease"
    if profile.write_once:
        raise LtsError("lock", str(path), "a write-once mount without file locks cannot keep two runs apart")
    with translate_lts("lock", path):
        return DatasetLock(_Lease(path, dataset_id, holder), path, holder)


class _FileLock:
    def __init__(self, path: Path, dataset_id: str, holder: str) -> None:
        self._path = path
        # NFS grants an exclusive lock only on a file that is open for writing, so every account that runs needs it.
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o664)
        try:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DatasetBusyError(dataset_id, _read_holder(self._fd)) from error
            self._require_in_place(dataset_id)
            with suppress(OSError):  # for people; the lock does not depend on it
                os.ftruncate(self._fd, 0)
                os.pwrite(self._fd, holder.encode("utf-8", "backslashreplace")[:_HOLDER_BYTES], 0)
        except BaseException:
            os.close(self._fd)
            raise

    def _require_in_place(self, dataset_id: str) -> None:
        """Somebody may have deleted the file between its opening and its locking."""
        if not self.held():
            raise DatasetBusyError(dataset_id, "a run that replaced the lock file")

    def held(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), self._path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        with suppress(OSError):
            os.ftruncate(self._fd, 0)
        os.close(self._fd)


class _Lease:
    def __init__(self, path: Path, dataset_id: str, holder: str) -> None:
        self._path = path
        self._token = secrets.token_hex(16)
        self._text = f"{self._token} {holder}".encode("utf-8", "backslashreplace")[:_HOLDER_BYTES]
        if not self._create():
            self._remove_expired(dataset_id)
            if not self._create():
                raise DatasetBusyError(dataset_id, self._holder())

    def held(self) -> bool:
        if self._read(self._path)[:32] != self._token:
            return False
        os.utime(self._path)  # without times: the server's clock
        return True

    def release(self) -> None:
        if self._read(self._path)[:32] == self._token:
            self._path.unlink()

    def _create(self) -> bool:
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o664)
        except FileExistsError:
            return False
        try:
            os.write(fd, self._text)
        finally:
            os.close(fd)
        return True

    def _remove_expired(self, dataset_id: str) -> None:
        """Takes an expired lease away; of several that try, the exclusive create after it lets one in."""
        token, age_s = self._read(self._path)[:32], self._age_s()
        if age_s < LEASE_EXPIRY_S:
            raise DatasetBusyError(dataset_id, self._holder())
        aside = self._path.with_name(f".lease.{self._token}")
        with suppress(FileNotFoundError):
            rename_file(self._path, aside, replace=True)
            if self._read(aside)[:32] != token:  # a new holder's, who was quicker: give it back
                with suppress(FileExistsError):
                    rename_file(aside, self._path, replace=False)
                raise DatasetBusyError(dataset_id, self._holder())
            aside.unlink()

    def _age_s(self) -> float:
        """Age by the server's clock: a fresh file's time minus the lease's."""
        fresh = self._path.with_name(f".clock.{self._token}")
        os.close(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o664))
        try:
            return fresh.stat().st_mtime - self._path.stat().st_mtime
        except FileNotFoundError:
            return 0.0
        finally:
            fresh.unlink()

    def _holder(self) -> str:
        return self._read(self._path)[33:] or "another run"

    @staticmethod
    def _read(path: Path) -> str:
        try:
            return path.read_bytes()[:_HOLDER_BYTES].decode("utf-8", "replace")
        except FileNotFoundError:
            return ""


def _read_holder(fd: int) -> str:
    with suppress(OSError):
        return os.pread(fd, _HOLDER_BYTES, 0).decode("utf-8", "replace").strip() or "another run"
    return "another run"
