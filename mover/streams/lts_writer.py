"""Writes one datablock to the LTS: preallocated, each byte once at its offset, committed by a durable rename."""

from __future__ import annotations

import errno
import os
import re
import secrets
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mover.errors import LayoutMismatchError, LtsError, WriteOnceError
from mover.streams.durable import commit_file, commit_in_place, rename_file, sync_data, sync_folder
from mover.streams.interfaces import Buffer
from mover.streams.lts_mount import MountProfile, allocate, translate_lts

__all__ = ["LtsWriter", "find_temporaries", "withdraw_file"]

_IOV_MAX = 1024  # buffers per pwritev, a limit of the kernel
_MODE = 0o644  # what the umask leaves of it: readable by the group that serves retrievals
_REWRITE_REFUSALS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class LtsWriter:
    """A PositionalSink on the LTS.

    Where the mount renames, bytes go to a hidden ``.<name>.<16 hex digits>.part`` beside the final name, and ``commit``
    renames it. The digits are drawn anew for each file and are its ``file_id``: an inode number is given again soon
    after a delete, and a journal on another host would take a stranger's file for its own. Where the mount does not
    rename (write-once shares) the final name is used at once, ``file_id`` is the inode, and only the manifest commits.

    Attributes:
        temporary: where the bytes go.
        inode: the file's number, which it keeps under its final name.
        file_id: tells this file from any other one that stood under the same name.
        resumed: an earlier run's file was opened again, with whatever it wrote.
        allocated: the file's space is taken already and missing from the share's free space.
        size_bytes: the planned size; the file has it from the start, where the mount can set lengths.
    """

    def __init__(self, fd: int, temporary: Path, final: Path, size_bytes: int, profile: MountProfile) -> None:
        """Takes over ``fd``; use ``LtsWriter.open``."""
        self._fd = fd
        self._final = final
        self._lock = threading.Lock()
        self._written_bytes = 0
        self._failed = False
        self._closed = False
        self._profile = profile
        self.temporary = temporary
        self.inode = os.fstat(fd).st_ino
        self.file_id = self.inode if temporary == final else int(_part_digits(final.name, temporary.name), 16)
        self.resumed = False
        self.allocated = False
        self.size_bytes = size_bytes

    @classmethod
    def open(cls, final: Path, size_bytes: int, profile: MountProfile, *, resume: bool) -> LtsWriter:
        """Opens the file that ``commit`` will name ``final``, which has no manifest. Blocking.

        ``resume`` takes up what an earlier run left, when it has the planned size; otherwise that is removed.

        Raises:
            NotEnoughSpaceError: the space cannot be taken.
            WriteOnceError: an earlier run's file stands there and the mount lets nobody start it anew.
            LtsError: the mount fails.
        """
        with translate_lts("open", final, size_bytes):
            if profile.rename:
                fd, temporary, resumed = _open_temporary(final, size_bytes, profile, resume=resume)
            else:
                temporary = final
                fd, resumed = _open_in_place(final, size_bytes, profile, resume=resume)
            writer = cls(fd, temporary, final, size_bytes, profile)
            writer.resumed = resumed
            try:
                writer._take_space()
            except BaseException:
                writer.close()
                if not resumed:
                    _empty_or_delete(temporary, profile)  # gives back what was taken of too little space
                raise
        return writer

    @property
    def written_bytes(self) -> int:
        """Bytes written through this object so far."""
        return self._written_bytes

    def write_at(self, offset_bytes: int, buffers: Sequence[Buffer]) -> None:
        """As of PositionalSink.

        Raises:
            LayoutMismatchError: the bytes would lie outside the planned size; none is written.
            NotEnoughSpaceError: the share or the quota is full.
            WriteOnceError: the mount refuses to change what an earlier run wrote.
            LtsError: any other failure; what was written of the buffers is unknown.
        """
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        total_bytes = sum(view.nbytes for view in views)
        if offset_bytes < 0 or offset_bytes + total_bytes > self.size_bytes:
            raise LayoutMismatchError(str(self._final), "end of a write", self.size_bytes, offset_bytes + total_bytes)
        try:
            with translate_lts("write", self.temporary, total_bytes):
                self._write_all(offset_bytes, views)
        except LtsError as error:
            cause = error.__cause__
            if self.resumed and isinstance(cause, OSError) and cause.errno in _REWRITE_REFUSALS:
                raise WriteOnceError(str(self.temporary), "rewriting was refused") from cause
            raise
        with self._lock:
            self._written_bytes += total_bytes

    def checkpoint(self) -> None:
        """As of PositionalSink. After one failure every further one fails: the kernel reports lost pages only once.

        Raises:
            NotEnoughSpaceError, LtsError: something written since the last checkpoint may be lost.
        """
        self._refuse_after_failure("sync")
        try:
            with translate_lts("sync", self.temporary):
                sync_data(self._fd)
        except BaseException:
            self._failed = True
            raise

    def commit(self) -> None:
        """As of PositionalSink. Replaces a datablock of the same name: one without manifest, as ``open`` demands.

        Raises:
            LayoutMismatchError: the file does not have the planned size.
            NotEnoughSpaceError, LtsError: it could not be made durable; the final name does not show it.
        """
        self._refuse_after_failure("commit")
        try:
            with translate_lts("commit", self._final):
                if self.temporary == self._final:
                    commit_in_place(self._fd, self._final, self.size_bytes)
                else:
                    commit_file(self._fd, self.temporary, self._final, self.size_bytes, replace=True)
        except BaseException:
            self._failed = True
            raise
        with suppress(OSError):  # frees this host's memory; the reader makes sure for itself
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        self.close()

    def close(self) -> None:
        """As of PositionalSink; no thread may be writing."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            with suppress(OSError):  # what was not synced is not counted on
                os.close(self._fd)

    def _take_space(self) -> None:
        if self._profile.truncate and os.fstat(self._fd).st_size != self.size_bytes:
            os.ftruncate(self._fd, self.size_bytes)
        if self._profile.truncate and self._profile.fallocate:
            self.allocated = allocate(self._fd, self.size_bytes)

    def _write_all(self, offset_bytes: int, views: list[memoryview]) -> None:
        index = 0
        while index < len(views):
            batch = views[index : index + _IOV_MAX]
            written_bytes = os.pwritev(self._fd, batch, offset_bytes)
            offset_bytes += written_bytes
            while index < len(views) and written_bytes >= views[index].nbytes:
                written_bytes -= views[index].nbytes
                index += 1
            if index < len(views) and written_bytes:
                views[index] = views[index][written_bytes:]

    def _refuse_after_failure(self, op: str) -> None:
        if self._failed:
            raise LtsError(op, str(self.temporary), "an earlier sync of this file failed; it has to be opened again")


def find_temporaries(final: Path) -> list[Path]:
    """The hidden files that writers of ``final`` left, the newest first. Blocking."""
    found = []
    with os.scandir(final.parent) as entries:
        for entry in entries:
            if _part_digits(final.name, entry.name):
                with suppress(FileNotFoundError):
                    found.append((entry.stat(follow_symlinks=False).st_mtime_ns, Path(entry.path)))
    return [path for _, path in sorted(found, reverse=True)]


def withdraw_file(final: Path) -> int:
    """Gives a finished file a writer's hidden name again; returns the ``file_id`` that goes with it. Blocking."""
    temporary = _new_temporary(final)
    rename_file(final, temporary, replace=False)
    sync_folder(final.parent)
    return int(_part_digits(final.name, temporary.name), 16)


def _new_temporary(final: Path) -> Path:
    # 63 bits: the number has to fit the signed integers of journals and databases
    return final.with_name(f".{final.name}.{secrets.randbits(63):016x}.part")


def _part_digits(name: str, candidate: str) -> str:
    match = re.fullmatch(rf"\.{re.escape(name)}\.([0-9a-f]{{16}})\.part", candidate)
    return match[1] if match else ""


def _open_temporary(final: Path, size_bytes: int, profile: MountProfile, *, resume: bool) -> tuple[int, Path, bool]:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    kept: tuple[int, Path] | None = None
    for left in find_temporaries(final):
        if resume and kept is None and left.stat().st_size == size_bytes:
            kept = os.open(left, flags), left
        else:
            _empty_or_delete(left, profile)
    if kept is not None:
        return *kept, True
    temporary = _new_temporary(final)
    return os.open(temporary, flags | os.O_CREAT | os.O_EXCL, _MODE), temporary, False


def _empty_or_delete(path: Path, profile: MountProfile) -> None:
    if profile.delete and profile.rename:
        path.unlink(missing_ok=True)
    elif profile.truncate:
        with suppress(FileNotFoundError):
            os.truncate(path, 0)


def _empty_in_place(fd: int, final: Path, profile: MountProfile) -> None:
    if profile.truncate:
        os.ftruncate(fd, 0)
    elif os.fstat(fd).st_size:
        raise WriteOnceError(str(final), "a datablock without manifest stands there and cannot be truncated")


def _open_in_place(final: Path, size_bytes: int, profile: MountProfile, *, resume: bool) -> tuple[int, bool]:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(final, flags, _MODE)
    except OSError as error:
        if error.errno in _REWRITE_REFUSALS and os.path.lexists(final):
            raise WriteOnceError(str(final), "a datablock without manifest stands there, closed for writing") from error
        raise
    try:
        found_bytes = os.fstat(fd).st_size
        # Without truncate the length grows with the writes, so a shorter file is as good as one of full length.
        usable = found_bytes == size_bytes if profile.truncate else 0 < found_bytes <= size_bytes
        if resume and usable:
            return fd, True
        _empty_in_place(fd, final, profile)
    except BaseException:
        os.close(fd)
        raise
    return fd, False
