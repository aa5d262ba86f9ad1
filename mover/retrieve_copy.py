"""What a retrieval writes: the objects that one datablock becomes, and the proof that each of them has to pass."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import msgspec

from mover.errors import DigestMismatchError
from mover.model import Manifest, ManifestMember, raw_object_key, window_range
from mover.streams.hashing import ALGORITHM, WindowHash, digest_of, labelled
from mover.streams.interfaces import Buffer
from mover.streams.units import BATCH_BYTES, BATCH_MEMBERS, SMALL_BYTES
from mover.streams.upload import FilePiece, ObjectUpload, Section, pieces_of
from mover.verification import expected_windows
from mover.verify import ReadBack, raise_breaks

__all__ = [
    "DIGEST_KEY",
    "SHA256_KEY",
    "DatablockCheck",
    "MemberCheck",
    "Selection",
    "Target",
    "copy_pieces",
    "datablock_target",
    "member_targets",
    "read_sidecar",
    "sidecar",
]

DIGEST_KEY = "mover-digest"
SHA256_KEY = "mover-sha256"
"""Metadata of retrieved objects; multipart uploads have no ``mover-sha256``."""

_WINDOWS = f"{ALGORITHM}-windows"
_SIDE = "the LTS"


class Target(msgspec.Struct, frozen=True):
    """An object that a datablock, or one member of it, becomes. ``index`` is the member's; None: the whole datablock.

    ``digest`` is the datablock's, the digest of a member's only window, or for more windows
    ``xxh3_128-windows:<digest of the windows' digests>-<number of windows>``.
    """

    key: str
    size_bytes: int
    digest: str
    index: int | None = None


class DatablockCheck:
    """All of a datablock: its tar structure, each window, and the whole, as the manifest has them."""

    def __init__(self, manifest: Manifest, on_proved: Callable[[str], None]) -> None:
        """``on_proved`` is told the SHA-256, in a worker thread."""
        self._manifest, self._on_proved = manifest, on_proved
        self._comparison = ReadBack(manifest, expected_windows(manifest), {})
        self._sha256 = hashlib.sha256()

    def feed(self, view: memoryview, /) -> None:
        """See ``Check``."""
        self._comparison.feed(view)
        self._sha256.update(view)

    def finish(self) -> dict[str, str]:
        """See ``Check``."""
        result = self._comparison.finish()
        if result.breaks:
            raise_breaks(result.breaks)
        found = labelled(result.digest)
        if found != self._manifest.digest:
            name = self._manifest.name
            raise DigestMismatchError(name, ALGORITHM, self._manifest.digest, found, _SIDE)
        sha256 = self._sha256.hexdigest()
        self._on_proved(sha256)
        return {SHA256_KEY: sha256}


class MemberCheck:
    """One member: each of its windows as the manifest has it."""

    def __init__(self, manifest: Manifest, member: ManifestMember, on_proved: Callable[[str], None]) -> None:
        """``on_proved`` is told the SHA-256, in a worker thread."""
        self._where = f"{manifest.archive_id.rpartition('/')[2]}, member {member.path!r}"
        self._member, self._on_proved = member, on_proved
        self._window = 0
        self._position = 0
        self._digest = WindowHash()
        self._sha256 = hashlib.sha256()

    def feed(self, view: memoryview, /) -> None:
        """See ``Check``."""
        self._sha256.update(view)
        while view:
            _, end = window_range(self._member.size_bytes, self._window)
            piece, view = view[: end - self._position], view[end - self._position :]
            self._digest.update(piece)
            self._position += len(piece)
            if self._position == end < self._member.size_bytes:
                self._compare()

    def finish(self) -> dict[str, str]:
        """See ``Check``."""
        self._compare()
        sha256 = self._sha256.hexdigest()
        self._on_proved(sha256)
        return {SHA256_KEY: sha256}

    def _compare(self) -> None:
        found, expected = self._digest.hexdigest(), self._member.windows[self._window]
        if found != expected:
            where = f"{self._where}, window {self._window}"
            raise DigestMismatchError(where, ALGORITHM, expected, found, _SIDE)
        self._window += 1
        self._digest = WindowHash()


class Selection:
    """Names of files and folders that were asked for, and those of them that were not found yet."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {name.rstrip("/"): name for name in names}
        self._found: set[str] = set()

    @property
    def unknown(self) -> list[str]:
        """What was not found, as it was asked for."""
        return [name for bare, name in self._names.items() if bare not in self._found]

    def among(self, manifest: Manifest) -> frozenset[str]:
        """Paths of members that are named, or below a folder that is."""
        return frozenset(member.path for member in manifest.members if self.takes(member.path))

    def takes(self, path: str) -> bool:
        """Whether this path is named, or lies below a folder that is."""
        named = [name for name in _with_folders(path) if name in self._names]
        self._found.update(named)
        return bool(named)


def _with_folders(path: str) -> Iterator[str]:
    yield path
    while path := path.rpartition("/")[0]:
        yield path


def datablock_target(manifest: Manifest) -> Target:
    """The datablock as one object."""
    return Target(manifest.archive_id, manifest.size_bytes, manifest.digest)


def member_targets(manifest: Manifest, wanted: Collection[str] | None) -> list[Target]:
    """The members as one object each, in their order; ``wanted``: these paths only."""
    return [
        Target(raw_object_key(manifest.dataset_id, member.path), member.size_bytes, _member_digest(member), index)
        for index, member in enumerate(manifest.members)
        if wanted is None or member.path in wanted
    ]


def copy_pieces(manifest: Manifest, uploads: Iterable[tuple[Target, ObjectUpload]]) -> Iterator[FilePiece]:
    """What has to be read for ``uploads``, in the order of the file; small neighbours are read together.

    Takes the uploads one by one: those of a datablock are too many to exist at a time.
    """
    together: list[tuple[ManifestMember, ObjectUpload]] = []
    last_index = -1
    for target, upload in uploads:
        if target.index is None:
            yield from pieces_of(upload, 0)
            continue
        member = manifest.members[target.index]
        small = member.size_bytes <= SMALL_BYTES
        if together and (not small or target.index != last_index + 1 or not _has_room(together, member)):
            yield _piece(together)
            together = []
        if small:
            together.append((member, upload))
        else:
            yield from pieces_of(upload, member.payload_offset_bytes)
        last_index = target.index
    if together:
        yield _piece(together)


def sidecar(key: str) -> str:
    """Key of the small object beside a datablock that holds its SHA-256, as ``sha256sum -c`` reads it."""
    return f"{key}.sha256"


def read_sidecar(content: Buffer) -> str:
    """The SHA-256 in a sidecar; '' when there is none."""
    found = re.match(rb"[0-9a-f]{64}(?= )", content)
    return found[0].decode() if found else ""


def _has_room(together: Sequence[tuple[ManifestMember, ObjectUpload]], member: ManifestMember) -> bool:
    first = together[0][0]
    end_bytes = member.payload_offset_bytes + member.size_bytes
    return len(together) < BATCH_MEMBERS and end_bytes - first.payload_offset_bytes <= BATCH_BYTES


def _piece(together: Sequence[tuple[ManifestMember, ObjectUpload]]) -> FilePiece:
    begin = together[0][0].payload_offset_bytes
    sections = []
    for member, upload in together:
        start = member.payload_offset_bytes - begin
        sections.append(Section(upload, 1, start, start + member.size_bytes))
    return FilePiece(begin, sections[-1].end, tuple(sections))


def _member_digest(member: ManifestMember) -> str:
    if len(member.windows) == 1:
        return labelled(member.windows[0])
    joined = digest_of("".join(member.windows).encode())
    return f"{_WINDOWS}:{joined}-{len(member.windows)}"
