"""Layouts, plans and comparisons that tests of the data path share, on top of ``tests.datasets``."""

from __future__ import annotations

import tarfile
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest

import mover.model
import mover.streams.units
from mover.errors import LtsError
from mover.model import Datablock, Manifest, Member, SourceObject, archive_id
from mover.streams.tar import datablock_size_bytes, header_bytes, header_size_bytes, padding_bytes, structure
from tests.datasets import DATASET

__all__ = [
    "RecordingCatalogue",
    "datablock_bytes",
    "datablock_file",
    "expect_same_files",
    "flip",
    "lay_out",
    "listing_of",
    "read_tar",
    "small_windows",
]


def lay_out(files: Mapping[str, int], etags: Mapping[str, str] | None = None) -> Datablock:
    """The plan of one datablock with files of these sizes, in this order."""
    members, end_bytes = [], 0
    for path, size_bytes in files.items():
        header = header_size_bytes(path, size_bytes, 5)
        members.append(Member(path, size_bytes, (etags or {}).get(path, "e"), 5, end_bytes, header))
        end_bytes += header + size_bytes + padding_bytes(size_bytes)
    return Datablock(DATASET, 1, tuple(members), sum(files.values()), datablock_size_bytes(end_bytes))


def datablock_bytes(datablock: Datablock, files: Mapping[str, bytes]) -> bytes:
    """The whole tar file."""
    pieces = [piece.content for piece in structure(datablock)]
    bodies = [files[member.path] for member in datablock.members]
    return b"".join(piece + body for piece, body in zip(pieces, [*bodies, b""], strict=True))


def header_of(path: str, size_bytes: int) -> bytes:
    """A member's header as ``lay_out`` plans it."""
    return header_bytes(path, size_bytes, 5)


async def listing_of(files: Mapping[str, bytes], etags: Mapping[str, str]) -> AsyncIterator[SourceObject]:
    """A landing zone's listing."""
    for path, body in files.items():
        yield SourceObject(path, len(body), etags[path], 5)


def datablock_file(lts_root: Path, number: int = 1, dataset_id: str = DATASET) -> Path:
    """Where a datablock stands."""
    return lts_root / archive_id(dataset_id, number)


def read_tar(*paths: Path) -> dict[str, bytes]:
    """What Python's own reader finds in datablocks; each name once."""
    found: dict[str, bytes] = {}
    for path in paths:
        with tarfile.open(path) as archive:
            for info in archive:
                body = archive.extractfile(info)
                assert body is not None
                assert info.name not in found
                found[info.name] = body.read()
    return found


def expect_same_files(lts_root: Path, files: Mapping[str, bytes], dataset_id: str = DATASET) -> None:
    """The datablocks of a dataset hold exactly ``files``."""
    folder = datablock_file(lts_root, 1, dataset_id).parent
    assert read_tar(*sorted(folder.glob("*.tar"))) == dict(files)


def flip(path: Path, at_byte: int) -> None:
    """Turns one bit of a file, past every cache of the mover."""
    with path.open("r+b") as file:
        file.seek(at_byte)
        byte = file.read(1)[0]
        file.seek(at_byte)
        file.write(bytes([byte ^ 1]))


def small_windows(monkeypatch: pytest.MonkeyPatch, window_bytes: int, small_bytes: int) -> None:
    """Makes members of some kilobytes large ones of several windows."""
    monkeypatch.setattr(mover.model, "WINDOW_BYTES", window_bytes)
    monkeypatch.setattr(mover.streams.units, "SMALL_BYTES", small_bytes)
    monkeypatch.setattr(mover.streams.units, "BATCH_BYTES", small_bytes)


class RecordingCatalogue:
    """A catalogue in memory that refuses what ``refuses`` says, and looks at the world when it is told."""

    def __init__(
        self,
        refuses: Callable[[Manifest], bool] = lambda _: False,
        look: Callable[[Manifest], None] = lambda _: None,
    ) -> None:
        self._refuses, self._look = refuses, look
        self.registered: list[int] = []
        self.calls: list[tuple[str, int]] = []

    async def listed_files(self, dataset_id: str) -> None:
        """Keeps no list."""

    async def register(self, dataset_id: str, manifest: Manifest) -> bool:  # noqa: ARG002 - the protocol's
        self.calls.append(("register", manifest.number))
        self._look(manifest)
        if self._refuses(manifest):
            raise LtsError("register", str(manifest.number), "refused by a test")
        known = manifest.number in self.registered
        if not known:
            self.registered.append(manifest.number)
        return not known

    async def unregister(self, dataset_id: str, manifest: Manifest) -> None:  # noqa: ARG002 - the protocol's
        self.calls.append(("unregister", manifest.number))
        if manifest.number in self.registered:
            self.registered.remove(manifest.number)
