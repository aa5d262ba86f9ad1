"""What was done durably, one step after another, so that the next run fetches only what is missing.

One file per datablock, ``<scratch>/journal/<PID, percent-encoded>/<number>.jsonl``: JSON lines, each appended with one
write and synced. A torn last line is ignored. The journal saves work and proves nothing: whatever it says is read back
and compared before it counts, and without it everything is fetched again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import msgspec

from mover.errors import JournalError
from mover.streams.durable import append_durably, sync_folder
from mover.streams.pipe import WindowDigest
from mover.streams.units import WindowKey

__all__ = ["DatablockJournal", "Journal", "JournalState", "StagedPart"]


class StagedPart(msgspec.Struct, frozen=True):
    """One part of a datablock object in the staging bucket."""

    number: int
    etag: str


class _Begin(msgspec.Struct, frozen=True, tag="begin"):
    """The plan that the following lines belong to, and the file that they describe (the writer's ``file_id``)."""

    fingerprint: str
    size_bytes: int
    file_id: int


class _Windows(msgspec.Struct, frozen=True, tag="windows"):
    """Digests of windows that are durable in the file."""

    windows: tuple[WindowDigest, ...]


class _Moved(msgspec.Struct, frozen=True, tag="moved"):
    """The file is complete: what stands under the final name with this inode is it."""

    inode: int


class _Renamed(msgspec.Struct, frozen=True, tag="renamed"):
    """The file lost its final name again, to be mended; its windows are still the same."""

    file_id: int


class _Forget(msgspec.Struct, frozen=True, tag="forget"):
    """Windows that a read-back found broken: they have to be fetched again."""

    windows: tuple[WindowKey, ...]


class _Staging(msgspec.Struct, frozen=True, tag="staging"):
    """A multipart upload to the staging bucket that was begun; its windows are those of the parts that follow."""

    upload_id: str


class _Staged(msgspec.Struct, frozen=True, tag="staged"):
    """One part in the staging bucket, and the digests of its windows as received from the landing zone."""

    part: StagedPart
    windows: tuple[WindowDigest, ...]


_Entry = _Begin | _Windows | _Moved | _Renamed | _Forget | _Staging | _Staged


class JournalState(msgspec.Struct):
    """What a journal adds up to."""

    fingerprint: str = ""
    size_bytes: int = 0
    file_id: int = 0
    moved_id: int = 0
    windows: dict[WindowKey, str] = {}
    upload_id: str = ""
    parts: dict[int, StagedPart] = {}
    staged_windows: dict[WindowKey, str] = {}

    def describes(self, fingerprint: str, size_bytes: int) -> bool:
        """Whether the entries belong to this plan."""
        return (self.fingerprint, self.size_bytes) == (fingerprint, size_bytes)


class Journal:
    """The journals of all datablocks below one folder. All methods block."""

    def __init__(self, scratch: Path) -> None:
        self._folder = scratch / "journal"

    def open(self, dataset_id: str, number: int) -> DatablockJournal:
        """The journal of one datablock, made when it is not there.

        Raises:
            JournalError: the folder cannot be written.
        """
        folder = self._dataset_folder(dataset_id)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)
            return DatablockJournal(folder / f"{number}.jsonl")
        except OSError as exc:
            raise JournalError(str(folder), exc.strerror or str(exc)) from exc

    def forget(self, dataset_id: str) -> None:
        """Drops the journals of a dataset that is done."""
        shutil.rmtree(self._dataset_folder(dataset_id), ignore_errors=True)

    def _dataset_folder(self, dataset_id: str) -> Path:
        return self._folder / quote(dataset_id, safe="")


class DatablockJournal:
    """One datablock's journal, read when opened; ``state`` follows what is appended. All methods block."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        sync_folder(path.parent)
        self.state = JournalState()
        self._encoder = msgspec.json.Encoder()
        self._load()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin(self, fingerprint: str, size_bytes: int, file_id: int) -> None:
        """Starts anew: what was recorded before is dropped, but for what the staging bucket has of the same plan."""
        if not self.state.describes(fingerprint, size_bytes):
            self.state = JournalState()
            os.ftruncate(self._descriptor, 0)
            os.lseek(self._descriptor, 0, os.SEEK_SET)
        self._append(_Begin(fingerprint, size_bytes, file_id))

    def add_windows(self, windows: Sequence[WindowDigest]) -> None:
        """Records windows that are durable in the file."""
        self._append(_Windows(tuple(windows)))

    def moved(self, inode: int) -> None:
        """Records, before the file gets its final name, that it is complete, and which file that is."""
        self._append(_Moved(inode))

    def renamed(self, file_id: int) -> None:
        """Records that the file has a writer's hidden name again."""
        self._append(_Renamed(file_id))

    def forget_windows(self, windows: Collection[WindowKey]) -> None:
        """Records that windows have to be fetched again."""
        self._append(_Forget(tuple(windows)))

    def begin_staging(self, upload_id: str) -> None:
        """Records an upload to the staging bucket; parts of an earlier one no longer count."""
        self._append(_Staging(upload_id))

    def add_part(self, part: StagedPart, windows: Sequence[WindowDigest]) -> None:
        """Records one part that the staging bucket has."""
        self._append(_Staged(part, tuple(windows)))

    def close(self) -> None:
        """Closes the file; closing twice is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _append(self, entry: _Entry) -> None:
        try:
            append_durably(self._descriptor, self._encoder.encode(entry) + b"\n")
        except OSError as exc:
            raise JournalError(str(self._path), exc.strerror or str(exc)) from exc
        self._apply(entry)

    def _load(self) -> None:
        decoder = msgspec.json.Decoder(_Entry)
        good_bytes = 0
        with os.fdopen(os.dup(self._descriptor), "rb") as lines:
            for line in lines:
                try:
                    entry = decoder.decode(line)
                except msgspec.DecodeError:
                    break
                if not line.endswith(b"\n"):
                    break
                self._apply(entry)
                good_bytes += len(line)
        os.ftruncate(self._descriptor, good_bytes)  # a torn line would swallow the next one
        os.lseek(self._descriptor, good_bytes, os.SEEK_SET)

    def _apply(self, entry: _Entry) -> None:
        state = self.state
        match entry:
            case _Begin():
                if entry.file_id != state.file_id:
                    state.windows = {}
                state.moved_id = 0
                state.fingerprint, state.size_bytes, state.file_id = entry.fingerprint, entry.size_bytes, entry.file_id
            case _Windows():
                state.windows.update(((index, window), digest) for index, window, digest in entry.windows)
            case _Moved():
                state.moved_id = entry.inode
            case _Renamed():
                state.file_id, state.moved_id = entry.file_id, 0
            case _Forget():
                state.moved_id = 0
                for key in entry.windows:
                    state.windows.pop(key, None)
            case _Staging():
                state.upload_id, state.parts, state.staged_windows = entry.upload_id, {}, {}
            case _Staged():
                state.parts[entry.part.number] = entry.part
                state.staged_windows.update(((index, window), digest) for index, window, digest in entry.windows)
