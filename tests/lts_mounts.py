"""Real folders that misbehave as shares do: full ones, write-once ones."""

from __future__ import annotations

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
