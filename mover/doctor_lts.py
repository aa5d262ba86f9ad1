"""Checks of the LTS, the scratch folder, limits and memory. Blocking calls may hang: all of them are abandonable."""

from __future__ import annotations

import math
import os
import secrets
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from mover.doctor import Check, Finding, fail, fine, skip, warn
from mover.engine import EngineConfig
from mover.errors import MissingMountError
from mover.shown import bytes_text, rate_text, seconds_text
from mover.streams.abandon import run_abandonable
from mover.streams.durable import sync_file, write_file_durably
from mover.streams.lts_mount import MEMORY_FILESYSTEMS, MountProfile, free_space, probe_mount
from mover.streams.page_cache import aligned_buffer, drop_pages, resident_bytes

__all__ = ["FolderSpeed", "LtsChecks", "measure_folder"]

T = TypeVar("T")

_PIECE_BYTES = 4 << 20
_SYNCS = 10
_SLOW_SYNC_S = 0.1
_SLOW_BYTES_PER_S = 50e6
_LARGEST_PARTS = 10_000
_SMALLEST_PART_BYTES = 5 << 20


class FolderSpeed(msgspec.Struct, frozen=True):
    """A file written with fsync and read back: bytes, seconds, and bytes that stayed in the page cache."""

    size_bytes: int
    write_s: float
    read_s: float
    cached_bytes: int
    identical: bool


def measure_folder(folder: Path, size_bytes: int, *, direct: bool) -> FolderSpeed:
    """Writes a hidden file in pieces, syncs it, drops it from the page cache, reads it back, removes it. Blocking."""
    path = folder / f".mover-doctor-{secrets.token_hex(8)}"
    piece, count = secrets.token_bytes(_PIECE_BYTES), max(1, size_bytes // _PIECE_BYTES)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        began = time.monotonic()
        for index in range(count):
            _write_piece(fd, piece, index * _PIECE_BYTES)
        sync_file(fd)
        written = time.monotonic()
        drop_pages(fd)
        cached_bytes = resident_bytes(fd)
        before = time.monotonic()
        identical = _read_back(path, piece, count, direct=direct)
        return FolderSpeed(count * _PIECE_BYTES, written - began, time.monotonic() - before, cached_bytes, identical)
    finally:
        os.close(fd)
        path.unlink()


def _write_piece(fd: int, piece: bytes, offset_bytes: int) -> None:
    done = 0
    while done < len(piece):
        done += os.pwrite(fd, memoryview(piece)[done:], offset_bytes + done)


def _read_back(path: Path, piece: bytes, count: int, *, direct: bool) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
    try:
        with aligned_buffer(len(piece)) as buffer:
            for index in range(count):
                if os.preadv(fd, [buffer], index * len(piece)) != len(piece) or buffer[:] != piece:
                    return False
    finally:
        os.close(fd)
    return True


class LtsChecks:
    """The checks of one engine's folders and numbers."""

    def __init__(self, config: EngineConfig, *, speed_bytes: int, deadline_s: float = 30.0) -> None:
        self._config, self._root = config, config.lts_root
        self._speed_bytes, self._deadline_s = speed_bytes, deadline_s
        self._profile: MountProfile | None = None

    def checks(self) -> list[Check]:
        """All checks, in an order in which later ones use what earlier ones found."""
        slow_s = self._deadline_s + self._speed_bytes / 2e6  # a share slower than 2 MB/s counts as hung
        hung = "the mount does not answer: look at the NFS server and at dmesg"
        return [
            Check("LTS", f"root {self._root}", self._mounted, hung, self._deadline_s),
            Check("LTS", "what the mount can do", self._probe, "let the mover write there", self._deadline_s),
            Check("LTS", "free space", self._space, hung, self._deadline_s),
            Check("LTS", "speed", self._speed, "let the mover write there", slow_s),
            Check(
                "scratch",
                str(self._config.scratch_folder),
                self._scratch,
                "let the mover write there",
                self._deadline_s,
            ),
            Check("limits", "memory", self._memory),
            Check("limits", "limits", self._limits),
        ]

    async def _blocking(self, call: Callable[[], T], deadline_s: float | None = None) -> T:
        return await run_abandonable(call, deadline_s or self._deadline_s)

    async def _mounted(self) -> Finding:
        return await self._blocking(lambda: _look_at_root(self._root))

    async def _probe(self) -> Finding:
        self._profile = profile = await self._blocking(lambda: probe_mount(self._root))
        names = ("rename", "truncate", "delete", "fallocate", "locks", "o_direct")
        able = [name for name in names if getattr(profile, name)]
        text = f"{profile.filesystem or 'unknown file system'}: {', '.join(able) or 'nothing of the kind'}"
        unable = [name for name in names if name not in able]
        text += f"; not: {', '.join(unable)}" if unable else ""
        if profile.write_once:
            advice = (
                "write-once (WORM): datablocks get their final names at once and the manifest commits them;"
                " what a killed run leaves stays"
            )
            return warn(text, advice)
        if not profile.locks:
            return warn(text, "no locks between hosts: leases stand in for them; mount without nolock/local_lock")
        return fine(text)

    async def _space(self) -> Finding:
        config = self._config
        reading = await self._blocking(lambda: free_space(self._root))
        floor_bytes = math.ceil(reading.total_bytes * config.free_space_percentage / 100)
        text = (
            f"{bytes_text(reading.free_bytes)} of {bytes_text(reading.total_bytes)} free,"
            f" {bytes_text(floor_bytes)} ({config.free_space_percentage:g} %) must stay free"
        )
        usable_bytes = reading.free_bytes - floor_bytes
        if config.target_bytes > reading.total_bytes - floor_bytes:
            return fail(text, "a datablock never fits: lower ARCHIVER_TARGET_SIZE_MB or LTS_FREE_SPACE_PERCENTAGE")
        if usable_bytes < config.target_bytes:
            return warn(f"{text}: no room for one datablock", "archiving waits until space is made on the LTS")
        return fine(f"{text}: room for {usable_bytes // config.target_bytes:,} datablock(s) of the target size")

    async def _speed(self) -> Finding:
        profile = self._profile
        if profile is None:
            return skip("the mount could not be probed")
        if not profile.delete:
            return skip("the mount cannot delete: a file to measure with would stay")
        reading = await self._blocking(lambda: free_space(self._root))
        if reading.free_bytes < 2 * self._speed_bytes:
            return skip(f"less than {bytes_text(2 * self._speed_bytes)} free")
        deadline_s = self._deadline_s + self._speed_bytes / 2e6
        speed = await self._blocking(
            lambda: measure_folder(self._root, self._speed_bytes, direct=profile.o_direct), deadline_s
        )
        text = (
            f"{bytes_text(speed.size_bytes)}: write and fsync {rate_text(speed.size_bytes, speed.write_s)},"
            f" read back {rate_text(speed.size_bytes, speed.read_s)}"
        )
        if not speed.identical:
            return fail(text, "other bytes came back: do not use this mount")
        if speed.cached_bytes and not profile.o_direct and profile.filesystem not in MEMORY_FILESYSTEMS:
            return fail(
                f"{text}; {bytes_text(speed.cached_bytes)} stay cached", "a read-back would not read the storage"
            )
        if speed.size_bytes / max(speed.write_s, 1e-9) < _SLOW_BYTES_PER_S:
            return warn(text, "slow for the LTS of an archive: check rsize/wsize, the network, the server")
        kept_out = "it is memory itself" if profile.filesystem in MEMORY_FILESYSTEMS else "the page cache is kept out"
        return fine(f"{text}; {kept_out}")

    async def _scratch(self) -> Finding:
        return await self._blocking(lambda: _look_at_scratch(self._config.scratch_folder))

    async def _memory(self) -> Finding:
        config = self._config
        part_bytes = max(_SMALLEST_PART_BYTES, math.ceil(config.target_bytes / _LARGEST_PARTS))
        text = f"MOVER_BUFFER_MB={config.buffer_bytes >> 20}, parts of {bytes_text(part_bytes)} for the target size"
        available_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if config.buffer_bytes > available_bytes // 2:
            return fail(text, f"this host has {bytes_text(available_bytes)}: lower MOVER_BUFFER_MB")
        if config.buffer_bytes < 2 * part_bytes:
            return fail(text, "raise MOVER_BUFFER_MB to twice the part, or lower ARCHIVER_TARGET_SIZE_MB")
        largest = bytes_text(config.buffer_bytes // 2 * _LARGEST_PARTS)
        return fine(f"{text}; the buffer does for a datablock of up to {largest}")

    async def _limits(self) -> Finding:
        config = self._config
        text = (
            f"LTS_FREE_LIMIT={config.lts_free_limit}, MOVE_TO_LTS_LIMIT={config.move_to_lts_limit},"
            f" VERIFY_LTS_LIMIT={config.verify_lts_limit}, LTS_TO_RETRIEVAL_LIMIT={config.lts_to_retrieval_limit},"
            f" MOVER_S3_CONCURRENCY={config.s3_concurrency}"
        )
        if config.lts_free_limit > 1:
            return warn(text, "LTS_FREE_LIMIT above 1 lets two runs count the same free space; set it to 1")
        streams = config.move_to_lts_limit + config.verify_lts_limit + config.lts_to_retrieval_limit
        if config.buffer_bytes // streams < 8 << 20:
            return warn(text, f"{streams} streams share {config.buffer_bytes >> 20} MiB: raise MOVER_BUFFER_MB")
        return fine(text)


def _look_at_root(root: Path) -> Finding:
    if not root.is_dir():
        raise MissingMountError(str(root))
    with os.scandir(root) as entries:
        empty = next(entries, None) is None
    contents = "empty" if empty else "not empty"
    if not root.is_mount():
        text = f"a folder on the same file system as its parent, {contents}"
        return warn(text, "no mount point: if the share should be mounted here, it is not, and tests alone may go on")
    return fine(f"a mount point, {contents}")


def _look_at_scratch(folder: Path) -> Finding:
    if not folder.exists():
        parent = next(parent for parent in folder.parents if parent.exists())
        if not os.access(parent, os.W_OK):
            return fail("it does not exist, and cannot be made", f"let the mover write to {parent}")
        return warn("it does not exist", "the first run makes it; the journal needs a volume that lasts")
    path = folder / f".mover-doctor-{secrets.token_hex(8)}"
    times = []
    try:
        for number in range(_SYNCS):
            began = time.monotonic()
            write_file_durably(path, b"%d" % number)
            times.append(time.monotonic() - began)
    finally:
        path.unlink(missing_ok=True)
    middle_s = statistics.median(times)
    text = f"a durable write takes {1000 * middle_s:.1f} ms, at most {seconds_text(max(times))}"
    return warn(text, "slow: put the journal on a local disk") if middle_s > _SLOW_SYNC_S else fine(text)
