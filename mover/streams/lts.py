"""The folder of one dataset on the LTS: datablocks, manifests, the lock. Everything here blocks.

A *name* is always a datablock's file name (``<PID with / as ->_<n>.tar``); its manifest stands beside it under
``<name>.manifest.json``. Hidden files (temporary ones, probes, the lock) are nobody's datablocks and never shown.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from mover.errors import HostileNameError, LtsError, ManifestError, WriteOnceError
from mover.model import dataset_folder
from mover.streams.durable import commit_in_place, make_folder_durably, write_file_durably
from mover.streams.lts_lock import DatasetLock, lock_dataset
from mover.streams.lts_mount import MountProfile, require_folder, translate_lts
from mover.streams.lts_writer import LtsWriter, find_temporaries, withdraw_file

__all__ = ["LtsFolder", "list_datasets"]

_DATABLOCKS = "datablocks"
_MANIFEST_SUFFIX = ".manifest.json"


class LtsFolder:
    """``<root>/openem-network/datasets/<PID>/datablocks``.

    On mounts that do not rename, an unfinished datablock already has its final name and perhaps its full size, and a
    killed ``write_manifest`` can leave a torn manifest: it does not count as one, and the next run writes it anew.
    """

    def __init__(self, root: Path, dataset_id: str, profile: MountProfile) -> None:
        """Touches nothing.  Raises HostileNameError for a PID that could lead out of the root."""
        if not dataset_id or "\0" in dataset_id or not {"", ".", ".."}.isdisjoint(dataset_id.split("/")):
            raise HostileNameError(dataset_id, "a PID has no empty, '.' or '..' segments and no NUL")
        self.root = root
        self.dataset_id = dataset_id
        self.profile = profile
        self.path = root / dataset_folder(dataset_id) / _DATABLOCKS

    @classmethod
    def open(cls, root: Path, dataset_id: str, profile: MountProfile, *, create: bool = True) -> LtsFolder:
        """The folder of a dataset below a root that must be there; with ``create``, durably made when missing.

        Raises:
            MissingMountError: the root is missing; it is never created.
            HostileNameError: the PID could lead out of the root.
            LtsError: the folder cannot be made.
        """
        folder = cls(root, dataset_id, profile)
        folder._require_root()
        if create:
            with translate_lts("create", folder.path):
                make_folder_durably(folder.path, below=root)
        return folder

    def open_writer(self, name: str, size_bytes: int, *, resume: bool, replace_committed: bool = False) -> LtsWriter:
        """A writer of one datablock; ``resume`` takes up what an earlier run left. The caller holds the lock.

        ``replace_committed`` is for repairs alone: the writer's ``commit`` takes the place of a datablock that has a
        manifest, with the bytes that the manifest describes.

        Raises:
            LtsError: a datablock with a manifest stands there, or as of LtsWriter.open.
            WriteOnceError: a repair on a mount that does not rename, or as of LtsWriter.open.
            NotEnoughSpaceError: as of LtsWriter.open.
        """
        if replace_committed and not self.profile.rename:
            raise WriteOnceError(str(self._datablock(name)), "a damaged datablock cannot be replaced")
        if not replace_committed and self._has_manifest(name):
            raise LtsError("write", str(self._datablock(name)), "a datablock with a manifest is never written again")
        return LtsWriter.open(self._datablock(name), size_bytes, self.profile, resume=resume)

    def datablock_size(self, name: str) -> int | None:
        """Size of the file under a datablock's final name, in bytes; None when there is none.

        Raises:
            LtsError: the mount fails.
        """
        with translate_lts("stat", self._datablock(name)):
            try:
                return self._datablock(name).stat().st_size
            except FileNotFoundError:
                return None

    def datablock_id(self, name: str) -> tuple[int, int]:
        """(inode, size in bytes) of the file under a datablock's final name; (0, 0) when there is none.

        Raises:
            LtsError: the mount fails.
        """
        with translate_lts("stat", self._datablock(name)):
            try:
                found = self._datablock(name).stat()
            except FileNotFoundError:
                return 0, 0
            return found.st_ino, found.st_size

    def taken_bytes(self, name: str) -> int:
        """Bytes of the share that an unfinished writer of this datablock holds already.

        Raises:
            LtsError: the mount fails.
        """
        final = self._datablock(name)
        with translate_lts("stat", final):
            try:
                return sum(left.stat().st_blocks * 512 for left in find_temporaries(final))
            except FileNotFoundError:
                return 0

    def withdraw(self, name: str) -> int:
        """Takes an uncommitted datablock's final name back for ``open_writer`` to resume it; returns its ``file_id``.

        Raises:
            LtsError: it has a manifest, or the mount fails.
        """
        final = self._datablock(name)
        if self._has_manifest(name):
            raise LtsError("withdraw", str(final), "a datablock with a manifest stays")
        with translate_lts("withdraw", final):
            return withdraw_file(final)

    def datablock_path(self, name: str) -> Path:
        """Where a datablock stands or will stand."""
        return self._datablock(name)

    def manifest_names(self) -> list[str]:
        """Names of the datablocks that have a manifest, by number; a dataset that is not there has none.

        Raises:
            MissingMountError: the root is missing.
            LtsError: the mount fails.
        """
        pattern = _manifest_pattern(self.dataset_id)
        found: list[tuple[int, str]] = []
        with translate_lts("list", self.path):
            try:
                entries = [entry.name for entry in self.path.iterdir()]
            except FileNotFoundError:
                self._require_root()
                return []
        for entry in entries:
            match = pattern.fullmatch(entry)
            if match:
                found.append((int(match[1]), entry.removesuffix(_MANIFEST_SUFFIX)))
        return [name for _, name in sorted(found) if self._has_manifest(name)]

    def read_manifest(self, name: str) -> bytes | None:
        """The manifest of a datablock as it was written; None when there is none. A recall from tape may block.

        Raises:
            LtsError: the mount fails.
        """
        data = self._read(self._manifest(name))
        return None if data is None or self._is_torn(data) else data

    def write_manifest(self, name: str, data: bytes) -> None:
        """Writes a manifest durably and once; the same bytes again are fine. ``data`` is one JSON document.

        Raises:
            ManifestError: another manifest stands there, or ``data`` is no JSON.
            WriteOnceError: a torn manifest stands there and the mount cannot truncate.
            NotEnoughSpaceError, LtsError: it could not be made durable.
        """
        path = self._manifest(name)
        if not _is_json(data):
            raise ManifestError(str(path), "not written: no whole JSON document")
        present = self.read_manifest(name)
        if present is None:
            with translate_lts("write", path, len(data)):
                self._put_manifest(path, data)
        elif present != data:
            raise ManifestError(str(path), "not written: another one stands there")

    def discard(self, name: str) -> None:
        """Removes what writers of an uncommitted datablock left; on write-once mounts empties it where that works.

        Raises:
            LtsError: the mount fails.
        """
        final = self._datablock(name)
        with translate_lts("discard", final):
            for left in find_temporaries(final):
                if self.profile.delete:
                    left.unlink(missing_ok=True)
                else:
                    os.truncate(left, 0)
            if not self.profile.rename and self.profile.truncate and not self._has_manifest(name):
                with suppress(FileNotFoundError):
                    os.truncate(final, 0)

    def lock(self, holder: str) -> DatasetLock:
        """Takes the dataset for one run, without waiting; ``holder`` (host, process, start) is shown to others.

        Raises:
            DatasetBusyError: another run holds it, in this process, another one or on another host.
            LtsError: the mount fails, or offers nothing to keep runs apart.
        """
        return lock_dataset(self.path, self.dataset_id, holder, self.profile)

    def exists(self) -> bool:
        """Whether there is such a folder. Blocking.  Raises LtsError."""
        with translate_lts("stat", self.path):
            return self.path.exists()

    def _require_root(self) -> None:
        require_folder(self.root)

    def _datablock(self, name: str) -> Path:
        prefix = self.dataset_id.replace("/", "-")
        if not re.fullmatch(rf"{re.escape(prefix)}_[1-9][0-9]*\.tar", name):
            raise HostileNameError(name, "not the name of a datablock of this dataset")
        return self.path / name

    def _manifest(self, name: str) -> Path:
        datablock = self._datablock(name)
        return datablock.with_name(datablock.name + _MANIFEST_SUFFIX)

    def _has_manifest(self, name: str) -> bool:
        if self.profile.rename:
            return os.path.lexists(self._manifest(name))
        return self.read_manifest(name) is not None

    def _is_torn(self, data: bytes) -> bool:
        """Elsewhere a manifest appears whole, and one that is no JSON is damage for the caller to report."""
        return not self.profile.rename and not _is_json(data)

    @staticmethod
    def _read(path: Path) -> bytes | None:
        with translate_lts("read", path):
            try:
                return path.read_bytes()
            except FileNotFoundError:
                return None

    def _put_manifest(self, path: Path, data: bytes) -> None:
        if self.profile.rename:
            write_file_durably(path, data, replace=False)
            return
        if not self.profile.truncate and os.path.lexists(path) and path.stat().st_size:
            raise WriteOnceError(str(path), "a torn manifest stands there and cannot be truncated")
        with path.open("wb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            commit_in_place(file.fileno(), path, len(data))


def list_datasets(root: Path) -> Iterator[str]:
    """PIDs of all datasets below the LTS root that have a manifest, in order of their folders. Blocking.

    Raises:
        MissingMountError: the root is missing.
        LtsError: the mount fails.
    """
    require_folder(root)
    top = root / dataset_folder("")
    stack = [top]
    while stack:
        folder = stack.pop()
        with translate_lts("list", folder):
            folders, files = _scan(folder)
        pid = folder.parent.relative_to(top).as_posix() if folder not in {top, *top.parents} else ""
        if folder.name == _DATABLOCKS and folder.parent != top:
            pattern = _manifest_pattern(pid)
            if any(pattern.fullmatch(name) for name in files):
                yield pid
        stack += [folder / name for name in sorted(folders, reverse=True)]


def _scan(folder: Path) -> tuple[list[str], list[str]]:
    folders: list[str] = []
    files: list[str] = []
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                (folders if entry.is_dir(follow_symlinks=False) else files).append(entry.name)
    return folders, files


def _manifest_pattern(dataset_id: str) -> re.Pattern[str]:
    prefix = re.escape(dataset_id.replace("/", "-"))
    return re.compile(rf"{prefix}_([1-9][0-9]*)\.tar{re.escape(_MANIFEST_SUFFIX)}")


def _is_json(data: bytes) -> bool:
    try:
        msgspec.json.decode(data, type=msgspec.Raw)
    except msgspec.DecodeError:
        return False
    return True
