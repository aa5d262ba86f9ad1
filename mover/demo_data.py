"""The files of the demonstration: a small folder with awkward names, or what a given folder holds. All of it blocks."""

from __future__ import annotations

import filecmp
import os
import random
import shutil
import stat
from pathlib import Path

import msgspec

from mover.errors import ConfigError
from mover.shown import bytes_text

__all__ = ["DemoFile", "DemoFiles", "check_room", "compare", "make_folder", "scan"]

_KEY_BYTES = 1024
_COPIES_ON_DISK = 4  # LTS, download, unpacked, and what the embedded storage keeps in temporary files
_MEMORY_SHARE = 3
_LARGE_BYTES = 5 << 19  # larger than the demonstration's target of 1 MiB
_CONTENTS: dict[str, int] = {
    "README.txt": 612,
    "with spaces/first file.dat": 40_000,
    "with spaces/ leading and trailing ": 77,
    "unicode/caf\u00e9 (NFC).txt": 1_200,
    "unicode/cafe\u0301 (NFD).txt": 1_201,
    "unicode/顕微鏡/グリッド 7.mrc": 300_000,
    "signs/a+b&c=d%20e#f?g.txt": 99,
    'signs/it\'s "quoted" [1].txt': 98,
    "signs/tab\tand ~.txt": 97,
    ".hidden/.config": 12,
    "empty/nothing": 0,
    "nested/1/2/3/4/5/6/7/8/deep.bin": 70_001,
    "frames/" + "long name " * 15 + ".tif": 512,
    "movie.tiff": _LARGE_BYTES,
}


class DemoFile(msgspec.Struct, frozen=True, gc=False):
    """One file to upload: its path below the folder, where it is, its size."""

    path: str
    source: Path
    size_bytes: int


class DemoFiles(msgspec.Struct, frozen=True):
    """What a folder holds; ``skipped`` is (name, reason)."""

    files: tuple[DemoFile, ...]
    skipped: tuple[tuple[str, str], ...]
    empty_folders: int

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(file.size_bytes for file in self.files)


def make_folder(folder: Path) -> None:
    """Fills ``folder`` with a few MB under names that break careless programs; the same bytes each time."""
    rng = random.Random(20)
    sizes = _CONTENTS | {f"frames/frame {number:03}.tif": rng.randrange(1, 60_000) for number in range(40)}
    for name, size_bytes in sizes.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(size_bytes))
    (folder / "latest.tiff").symlink_to("movie.tiff")
    (folder / "broken link").symlink_to("nowhere")


def scan(folder: Path, prefix_bytes: int) -> DemoFiles:
    """The regular files below ``folder``; links to files are followed. ``prefix_bytes`` precede each path in its key.

    Raises:
        ConfigError: it is no folder, or cannot be read.
    """
    if not folder.is_dir():
        raise ConfigError("FOLDER", str(folder), "a folder that exists")
    files, skipped, empty_folders = [], [], 0

    def refuse(error: OSError) -> None:
        skipped.append((str(error.filename), error.strerror or "cannot be read"))

    for where, folders, names in os.walk(folder, onerror=refuse):
        empty_folders += not folders and not names
        for name in (*names, *(name for name in folders if os.path.islink(os.path.join(where, name)))):  # noqa: PTH114, PTH118
            source = Path(where, name)
            path = source.relative_to(folder).as_posix()
            reason, size_bytes = _look_at(source, path, prefix_bytes)
            if reason:
                skipped.append((path, reason))
            else:
                files.append(DemoFile(path, source, size_bytes))
    files.sort(key=lambda file: file.path)
    return DemoFiles(tuple(files), tuple(skipped), empty_folders)


def _look_at(source: Path, path: str, prefix_bytes: int) -> tuple[str, int]:
    """Why a name is skipped, or '' and the size of the file."""
    try:
        key_bytes = prefix_bytes + len(path.encode())
        status = source.stat()
    except UnicodeEncodeError:
        return "the name is not UTF-8", 0
    except OSError as error:
        return ("broken link" if source.is_symlink() else error.strerror or "cannot be read"), 0
    if not stat.S_ISREG(status.st_mode):
        return ("link to a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"), 0
    if key_bytes > _KEY_BYTES:
        return f"its key would be longer than {_KEY_BYTES:,} bytes", 0
    if "\n" in path or "\r" in path:
        return "the embedded S3 storage knows no line ends in names", 0  # the mover does
    return ("", status.st_size) if os.access(source, os.R_OK) else ("cannot be read", 0)


def check_room(files: DemoFiles, folder: Path) -> None:
    """Whether memory and disk of this host are enough: the embedded S3 storage holds its objects in memory.

    Raises:
        ConfigError: they are not.
    """
    memory_bytes = _available_memory_bytes() // _MEMORY_SHARE
    disk_bytes = shutil.disk_usage(folder).free // _COPIES_ON_DISK
    limit_bytes = min(memory_bytes, disk_bytes)
    if files.size_bytes > limit_bytes:
        held = "the embedded S3 storage holds all objects in memory"
        reason = held if memory_bytes < disk_bytes else f"{folder} would get full"
        allowed = f"at most {bytes_text(limit_bytes)} on this host ({reason}); use a real S3 storage for more"
        raise ConfigError("FOLDER", bytes_text(files.size_bytes), allowed)


def _available_memory_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            return int(amount.split()[0]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def compare(files: DemoFiles, unpacked: Path) -> list[str]:
    """What differs between the files and what came back, in words; names alone tell what is missing or too much."""
    differences = []
    expected = {file.path for file in files.files}
    for file in files.files:
        found = unpacked / file.path
        if not found.is_file():
            differences.append(f"missing: {file.path!r}")
        elif not filecmp.cmp(file.source, found, shallow=False):
            differences.append(f"other bytes: {file.path!r}")
    for path in unpacked.rglob("*"):
        name = path.relative_to(unpacked).as_posix()
        if not path.is_dir() and name not in expected:
            differences.append(f"too much: {name!r}")
    return differences
