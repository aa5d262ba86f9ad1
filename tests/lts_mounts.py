"""Real folders that misbehave as shares do: full ones, write-once ones."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mover.streams.lts_mount import MountProfile

PLAIN = MountProfile(
    rename=True, truncate=True, delete=True, fallocate=True, locks=True, o_direct=True, filesystem="ext4"
)


def _run_or_skip(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{' '.join(command)}: {done.stderr.strip()}; needs root and Linux")


@contextmanager
def small_mount(folder: Path, size: str = "8m") -> Iterator[Path]:
    """A file system of its own in memory; only root may mount."""
    folder.mkdir()
    _run_or_skip("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def hung_mount(folder: Path) -> Iterator[None]:
    """Covers ``folder`` with a file system that never answers: FUSE, and nobody reads what the kernel asks.

    At the end everybody who waits gets an error, and what was there before is there again.
    """
    try:
        descriptor = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        pytest.skip(f"/dev/fuse: {error.strerror}; needs root and Linux")
    try:
        options = f"fd={descriptor},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"hung", os.fsencode(folder), b"fuse", 0, options):
            pytest.skip(f"mount of a FUSE: {os.strerror(ctypes.get_errno())}; needs root and Linux")
        try:
            yield
        finally:
            os.close(descriptor)  # which ends the connection
            descriptor = -1
            subprocess.run(["umount", "-l", str(folder)], check=True)
    finally:
        if descriptor >= 0:
            os.close(descriptor)


@contextmanager
def old_filesystem(folder: Path) -> Iterator[Path]:
    """An ext2, which cannot preallocate, in a file; as an NFSv3 mount cannot."""
    folder.mkdir()
    image = folder.with_name(folder.name + ".image")
    image.write_bytes(b"")
    os.truncate(image, 16 << 20)
    _run_or_skip("mkfs.ext2", "-q", str(image))
    _run_or_skip("mount", "-o", "loop", str(image), str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def write_once(folder: Path) -> Iterator[Path]:
    """A folder in which names can be added and neither renamed nor deleted: ext4's append-only attribute."""
    folder.mkdir(exist_ok=True)
    _run_or_skip("chattr", "+a", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["chattr", "-a", str(folder)], check=True)


@contextmanager
def closed_for_change(file: Path) -> Iterator[None]:
    """A file whose bytes the file system no longer lets anybody change."""
    _run_or_skip("chattr", "+i", str(file))
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", str(file)], check=True)


def visible(folder: Path) -> list[str]:
    """Names in a folder that are not hidden."""
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
