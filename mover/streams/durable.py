"""The one place where bytes are made durable and files get their names. Everything here blocks.

The order is always the same: temporary name in the same folder, bytes, byte count, fsync, rename, fsync of the folder.
A process killed in between leaves either the old state or the new one, and perhaps a hidden temporary file.
These routines raise OSError as it comes: each caller knows what it was doing and translates it.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from mover.errors import LayoutMismatchError
from mover.streams.interfaces import Buffer

__all__ = [
    "append_durably",
    "commit_file",
    "commit_in_place",
    "make_folder_durably",
    "rename_file",
    "sync_data",
    "sync_file",
    "sync_folder",
    "write_file_durably",
]

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
# How file systems say "no such operation here": NFS and FUSE to flags of renameat2, SMB to the fsync of a folder.
_NOT_OFFERED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
_libc = ctypes.CDLL(None, use_errno=True)


def sync_data(fd: int) -> None:
    """Makes the bytes written to ``fd`` so far durable, and the size if it grew."""
    os.fdatasync(fd)


def sync_file(fd: int) -> None:
    """Makes bytes and attributes of ``fd`` durable; writes out the pages that other descriptors dirtied, too."""
    os.fsync(fd)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable, where the file system has such an operation.

    Network file systems that answer EINVAL or ENOTSUP perform name changes synchronously on the server.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
    finally:
        os.close(fd)


def rename_file(source: Path, target: Path, *, replace: bool) -> None:
    """Renames within one file system; without ``replace``, FileExistsError when ``target`` exists.

    Where the kernel cannot rename exclusively (NFS), the check comes before the rename: callers hold a lock there.
    """
    if replace:
        source.replace(target)
        return
    if not hasattr(_libc, "renameat2") or not _rename_exclusively(source, target):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        source.rename(target)


def _rename_exclusively(source: Path, target: Path) -> bool:
    """False when the file system has no exclusive rename."""
    names = os.fsencode(source), os.fsencode(target)
    if _libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_NOREPLACE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_OFFERED:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


def commit_in_place(fd: int, path: Path, expected_bytes: int) -> None:
    """Compares the byte count and makes a file durable that has its final name already.

    Raises:
        LayoutMismatchError: the file does not have ``expected_bytes``.
    """
    found_bytes = os.fstat(fd).st_size
    if found_bytes != expected_bytes:
        raise LayoutMismatchError(str(path), "size in bytes", expected_bytes, found_bytes)
    os.fsync(fd)
    sync_folder(path.parent)


def commit_file(fd: int, temporary: Path, final: Path, expected_bytes: int, *, replace: bool = False) -> None:
    """Compares the byte count, syncs, gives the file its final name and syncs the folder; ``fd`` stays open.

    Raises:
        LayoutMismatchError: the file does not have ``expected_bytes``.
        FileExistsError: something stands under the final name and ``replace`` is not set.
    """
    found_bytes = os.fstat(fd).st_size
    if found_bytes != expected_bytes:
        raise LayoutMismatchError(str(temporary), "size in bytes", expected_bytes, found_bytes)
    os.fsync(fd)
    rename_file(temporary, final, replace=replace)
    sync_folder(final.parent)


def write_file_durably(path: Path, data: Buffer, *, replace: bool = True) -> None:
    """Writes a whole small file so that its name shows either all of ``data`` or what was there before.

    Raises:
        FileExistsError: ``path`` exists and ``replace`` is not set; nothing was changed.
        OSError: nothing stands under ``path`` that did not before; the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.part")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        try:
            _write_all(fd, data)
            commit_file(fd, temporary, path, memoryview(data).nbytes, replace=replace)
        finally:
            os.close(fd)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def append_durably(fd: int, data: Buffer) -> None:
    """Writes ``data`` at the position of ``fd`` and makes it durable; for journals. A kill may leave a part of it."""
    _write_all(fd, data)
    os.fdatasync(fd)


def make_folder_durably(path: Path, *, below: Path) -> None:
    """Creates ``path`` with the parents it lacks under ``below``, which must exist, and makes their names durable.

    Names that exist are synced too: whoever made them may have been killed before it did.
    """
    if not path.is_relative_to(below):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    folder = below
    for part in path.relative_to(below).parts:
        parent, folder = folder, folder / part
        folder.mkdir(exist_ok=True)
        sync_folder(parent)


def _write_all(fd: int, data: Buffer) -> None:
    view = memoryview(data).cast("B")
    while view:
        written_bytes = os.write(fd, view)
        view = view[written_bytes:]
