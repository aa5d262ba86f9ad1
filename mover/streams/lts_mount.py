"""What the mount under the LTS can do, found out by doing it, and how much room it has.

Everything here blocks, and on a hung mount it blocks for ever: callers run it in worker threads under a deadline of
their own (``streams/abandon.py``), so that a dead share is reported and not waited for.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from mover.errors import LtsError, MissingMountError, MoverError, NotEnoughSpaceError
from mover.policies.space import SpaceReading
from mover.streams.durable import rename_file

__all__ = [
    "MEMORY_FILESYSTEMS",
    "MountProfile",
    "allocate",
    "filesystem_of",
    "free_space",
    "probe_mount",
    "require_folder",
    "translate_lts",
]

MEMORY_FILESYSTEMS = frozenset({"tmpfs", "ramfs", "devtmpfs", "rootfs"})
"""File systems whose storage is the page cache itself."""

_PROBE = ".mover-probe"
_RENAMED_PROBE = ".mover-probe-renamed"
_PROBE_BYTES = 4096
_OUT_OF_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
# How mounts say "never": anything else is a failure of the moment and no property of the mount.
_REFUSALS = frozenset(
    {
        errno.EACCES,
        errno.EINVAL,
        errno.ENOLCK,
        errno.ENOSYS,
        errno.ENOTSUP,
        errno.EOPNOTSUPP,
        errno.EPERM,
        errno.EROFS,
    }
)
_libc = ctypes.CDLL(None, use_errno=True)


class MountProfile(msgspec.Struct, frozen=True):
    """What a mount allows. ``locks``: flock that other hosts see too; ``filesystem``: its type, '' when unknown."""

    rename: bool
    truncate: bool
    delete: bool
    fallocate: bool
    locks: bool
    o_direct: bool
    filesystem: str

    @property
    def write_once(self) -> bool:
        """A name that was given cannot be taken back or changed."""
        return not (self.rename and self.delete)


@contextmanager
def translate_lts(op: str, path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turns an OSError of the block into the project's error; ``needed_bytes`` is what a full share lacked."""
    try:
        yield
    except OSError as error:
        raise _lts_error(error, op, path, needed_bytes) from error


def _lts_error(error: OSError, op: str, path: Path, needed_bytes: int) -> MoverError:
    reason = f"{op} {path}: {error.strerror or error}"
    if error.errno in _OUT_OF_SPACE:
        free_bytes = 0
        with suppress(OSError, MoverError):
            free_bytes = free_space(path.parent).free_bytes
        return NotEnoughSpaceError(needed_bytes, free_bytes, 0, 0, 0.0, reason)
    name = errno.errorcode.get(error.errno or 0, type(error).__name__)
    return LtsError(op, str(path), f"{error.strerror or error} ({name})")


def require_folder(root: Path) -> None:
    """Looks whether ``root`` is there. Blocking.

    Raises:
        MissingMountError: it is no folder.
        LtsError: the mount fails.
    """
    with translate_lts("stat", root):
        if not root.is_dir():
            raise MissingMountError(str(root))


def free_space(root: Path, filesystem: str = "") -> SpaceReading:
    """Size of the share and what an unprivileged writer may still take. Blocking.

    ``filesystem`` is the type that was found there before: under a mount that is gone lies a folder of another one.

    Raises:
        MissingMountError: ``root`` is no folder, or is on another type of file system.
        LtsError: the share does not answer.
    """
    require_folder(root)
    if filesystem:
        with translate_lts("stat", root):
            found = filesystem_of(root)
        if found and found != filesystem and not (found.startswith("nfs") and filesystem.startswith("nfs")):
            raise MissingMountError(str(root), filesystem, found)
    with translate_lts("statvfs", root):
        numbers = os.statvfs(root)
    return SpaceReading(numbers.f_blocks * numbers.f_frsize, numbers.f_bavail * numbers.f_frsize)


def allocate(fd: int, size_bytes: int) -> bool:
    """Takes the space of the first ``size_bytes``, without writing it; False where the file system cannot. Blocking.

    The system call itself: the C library's ``posix_fallocate`` falls back to writing zeros, and every byte would be
    written twice.  Raises OSError when there is not enough space.
    """
    size = ctypes.c_longlong(size_bytes)
    while size_bytes > 0 and _libc.fallocate64(fd, 0, ctypes.c_longlong(0), size) != 0:
        number = ctypes.get_errno()
        if number in _REFUSALS:
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True


def filesystem_of(path: Path) -> str:
    """Type of the file system that holds ``path`` ('nfs4', 'ext4', ...), '' when the kernel does not tell. Blocking."""
    return _mount_of(path)[0]


def probe_mount(folder: Path) -> MountProfile:
    """Tries in ``folder`` what the mount can do. Blocking; leaves no file where files can be deleted.

    The small hidden files have fixed names, so that a mount that cannot delete them finds them again the next time.
    Several processes may probe the same folder at once.

    Raises:
        MissingMountError: ``folder`` is no folder.
        LtsError: the mount fails, or lets nobody write.
    """
    require_folder(folder)
    probe, renamed = folder / _PROBE, folder / _RENAMED_PROBE
    filesystem, options = _mount_of(folder)
    with translate_lts("probe", probe):
        fd = _open_probe(probe)
        try:
            truncate = fd is not None and _works(lambda: _try_truncate(fd))
            fallocate = fd is not None and _try_allocate(fd)
            locks = fd is not None and not _locks_are_local(options) and _works(lambda: _try_lock(fd, probe))
        finally:
            if fd is not None:
                os.close(fd)
        o_direct = filesystem not in MEMORY_FILESYSTEMS and _works(lambda: _try_direct(probe))
        rename = _works(lambda: rename_file(probe, renamed, replace=True))
        delete = _works((renamed if rename else probe).unlink)
    return MountProfile(rename, truncate, delete, fallocate, locks, o_direct, filesystem)


def _works(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except FileNotFoundError:
        return True  # another process that probes here has just renamed or deleted it
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        return False
    return True


def _open_probe(probe: Path) -> int | None:
    """None when the file of an earlier probe cannot be opened for writing any more."""
    try:
        return os.open(probe, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno in _REFUSALS and os.path.lexists(probe):
            return None
        raise


def _try_truncate(fd: int) -> None:
    os.pwrite(fd, b"\0", 0)
    os.ftruncate(fd, _PROBE_BYTES)
    os.ftruncate(fd, 0)


def _try_allocate(fd: int) -> bool:
    try:
        return allocate(fd, _PROBE_BYTES)
    except OSError as error:
        if error.errno not in _OUT_OF_SPACE:
            raise
        return True


def _try_lock(fd: int, probe: Path) -> None:
    """Raises ENOLCK when a second holder is let in."""
    with suppress(BlockingIOError):  # held by another process that probes here: the lock works
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        second = os.open(probe, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.path.samestat(os.fstat(fd), os.fstat(second)):  # not one that another process has put there since
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        finally:
            os.close(second)


def _try_direct(probe: Path) -> None:
    os.close(os.open(probe, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))


def _locks_are_local(options: frozenset[str]) -> bool:
    """NFS mounts that keep locks to this host: two hosts would both get them."""
    return bool(options & {"nolock", "local_lock=all", "local_lock=flock"})


def _mount_of(path: Path) -> tuple[str, frozenset[str]]:
    """Type and options of the mount that holds ``path``."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return "", frozenset()
    device = path.stat().st_dev
    identity = f"{os.major(device)}:{os.minor(device)}"
    for line in reversed(lines):  # later mounts cover earlier ones
        mount, _, source = line.partition(" - ")
        if mount.split(" ")[2] == identity:
            kind, _, options = source.split(" ", 2)
            return kind, frozenset(f"{mount.split(' ')[5]},{options.split(' ')[-1]}".split(","))
    return "", frozenset()
