"""The words of the project as frozen structs: objects, members, datablocks, plans, manifests, evidence. No I/O.

Sizes are bytes, times are seconds since 1970-01-01 UTC unless a name says otherwise, digests are lower-case hex.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec

__all__ = [
    "FORMAT_VERSION",
    "WINDOW_BYTES",
    "Anomaly",
    "CatalogueFile",
    "Datablock",
    "DatasetPlan",
    "Evidence",
    "EvidenceLevel",
    "Manifest",
    "ManifestMember",
    "Member",
    "Progress",
    "SourceChecksum",
    "SourceObject",
    "Stage",
    "archive_id",
    "datablock_name",
    "dataset_folder",
    "raw_files_prefix",
    "raw_object_key",
    "window_count",
    "window_range",
]

WINDOW_BYTES = 64 << 20
"""A window, the unit of parallel reading, digest, resume and repair: a fixed 64 MiB slice of a member."""

FORMAT_VERSION = 1
"""Version of the plan's layout and of the manifest; part of every fingerprint."""

_DATASETS = "openem-network/datasets"


class SourceObject(msgspec.Struct, frozen=True, gc=False):
    """One object of the landing zone as listed; ``path`` is its key below the dataset's ``raw_files/``."""

    path: str
    size_bytes: int
    etag: str  # without quotes
    mtime_s: int


class CatalogueFile(msgspec.Struct, frozen=True, gc=False):
    """One file of the catalogue's list. ``kind`` is read from the entry's permissions.

    Directories have entries without objects; a symlink's size is the length of its text, its object holds the target.
    """

    path: str
    size_bytes: int
    mtime_s: int | None = None
    kind: Literal["file", "directory", "symlink"] = "file"
    checksum: SourceChecksum | None = None


class SourceChecksum(msgspec.Struct, frozen=True, gc=False):
    """A checksum that the source claims for a whole member.

    ``algorithm``: md5, sha1, sha256, blake2b, crc64nvme, or the composites ``md5-parts`` (S3 multipart ETag: MD5 of the
    parts' MD5s) and ``sha256-parts``; composites need ``part_size_bytes``.
    ``value``: lower-case hex; composites end in ``-<number of parts>``.
    """

    algorithm: str
    value: str
    origin: Literal["catalogue", "s3-etag", "s3-checksum"]
    part_size_bytes: int | None = None


class Member(msgspec.Struct, frozen=True, gc=False):
    """One file inside a datablock, at a byte-exact place.

    ``offset_bytes`` is where its tar header begins; the payload follows ``header_bytes`` later.
    """

    path: str
    size_bytes: int
    etag: str
    mtime_s: int
    offset_bytes: int
    header_bytes: int

    @property
    def payload_offset_bytes(self) -> int:
        """Where the payload begins in the datablock."""
        return self.offset_bytes + self.header_bytes

    @property
    def end_bytes(self) -> int:
        """Where the next member begins: after the payload and its padding to 512 bytes."""
        return self.payload_offset_bytes + -(-self.size_bytes // 512) * 512


class Datablock(msgspec.Struct, frozen=True, gc=False):
    """The plan of one datablock; ``number`` counts from 1, ``size_bytes`` is the exact size of the tar file."""

    dataset_id: str
    number: int
    members: tuple[Member, ...]
    payload_bytes: int
    size_bytes: int

    @property
    def name(self) -> str:
        """File name on the LTS."""
        return datablock_name(self.dataset_id, self.number)


class Anomaly(msgspec.Struct, frozen=True, gc=False):
    """Something the plan noticed that does not stop it, e.g. an object that the catalogue does not list."""

    kind: Literal["extra-object", "duplicate-entry", "symlink-size", "missing-symlink", "directory-marker", "long-name"]
    path: str
    detail: str = ""


class DatasetPlan(msgspec.Struct, frozen=True):
    """What archiving a dataset writes; ``fingerprint`` is the xxh3_128 of everything that decides its bytes."""

    dataset_id: str
    datablocks: tuple[Datablock, ...]
    fingerprint: str
    file_count: int
    payload_bytes: int
    size_bytes: int
    anomalies: tuple[Anomaly, ...] = ()
    checksums: dict[str, SourceChecksum] = {}  # by path: what the catalogue claims


class EvidenceLevel(StrEnum):
    """What was proved about a datablock, weakest first."""

    WRITTEN = "written"  # every byte was handed to the mount and synced
    READ_BACK = "read-back"  # every byte was read from the storage again, not from this host's page cache
    RECALLED = "recalled"  # as read-back, and the file was offline (on tape) before


class Evidence(msgspec.Struct, frozen=True):
    """One proof. ``at`` is ISO 8601 UTC, ``digest`` is ``<algorithm>:<hex>`` of the whole datablock ('': none)."""

    level: EvidenceLevel
    at: str
    host: str
    digest: str = ""
    cache: Literal["", "direct", "dropped", "memory"] = ""  # how the page cache was kept out; memory: it is the storage


class ManifestMember(msgspec.Struct, frozen=True, gc=False):
    """A member with what was proved about it; ``windows`` are the xxh3_128 of its 64 MiB windows, in order."""

    path: str
    key: str
    etag: str
    size_bytes: int
    mtime_s: int
    offset_bytes: int
    header_bytes: int
    windows: tuple[str, ...]
    checksum: SourceChecksum | None = None

    @property
    def payload_offset_bytes(self) -> int:
        """Where the payload begins in the datablock."""
        return self.offset_bytes + self.header_bytes


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The commit record of a datablock, written once, last, after read-back. ARCHITECTURE.md describes the fields."""

    dataset_id: str
    number: int
    datablock_count: int
    archive_id: str
    fingerprint: str
    target_bytes: int
    size_bytes: int
    payload_bytes: int
    digest: str  # "xxh3_128:<hex>" of the whole datablock, from the read-back
    members: tuple[ManifestMember, ...]
    evidence: tuple[Evidence, ...]
    created_at: str
    software: str
    source: str = ""  # s3://bucket/prefix the members came from
    version: int = FORMAT_VERSION

    @property
    def name(self) -> str:
        """File name of the datablock on the LTS."""
        return datablock_name(self.dataset_id, self.number)


class Stage(StrEnum):
    """Steps of the two pipelines, in their order."""

    PLAN = "plan"
    LOCK = "lock"
    SPACE = "space"
    STAGE = "stage"
    MOVE = "move"
    VERIFY = "verify"
    REGISTER = "register"
    RELEASE = "release"
    RECALL = "recall"
    RETRIEVE = "retrieve"
    DONE = "done"


class Progress(msgspec.Struct, frozen=True):
    """One progress event. ``datablock`` 0: of the whole dataset; ``done_bytes`` never exceeds ``total_bytes``.

    ``state``: ``started``, ``progress``, ``waiting`` (``reason`` says for what), ``finished``, ``failed``.
    ``work_done_bytes`` of ``work_total_bytes``: how the whole dataset stands, where that cannot be added up from the
    events because some are left out; 0 where it can.
    """

    dataset_id: str
    stage: Stage
    state: Literal["started", "progress", "waiting", "finished", "failed"]
    datablock: int = 0
    done_bytes: int = 0
    total_bytes: int = 0
    reason: str = ""
    work_done_bytes: int = 0
    work_total_bytes: int = 0


def dataset_folder(dataset_id: str) -> str:
    """Folder of a dataset below the LTS root, and prefix in the buckets: ``openem-network/datasets/<PID>``."""
    return f"{_DATASETS}/{dataset_id}"


def raw_files_prefix(dataset_id: str) -> str:
    """Prefix of a dataset's objects in the landing zone; it ends in ``/`` so that ``raw_files_x`` does not match."""
    return f"{_DATASETS}/{dataset_id}/raw_files/"


def raw_object_key(dataset_id: str, path: str) -> str:
    """Key of one source object in the landing zone."""
    return f"{_DATASETS}/{dataset_id}/raw_files/{path}"


def datablock_name(dataset_id: str, number: int) -> str:
    """File name of a datablock: ``<PID with / as ->_<n>.tar``."""
    return f"{dataset_id.replace('/', '-')}_{number}.tar"


def archive_id(dataset_id: str, number: int) -> str:
    """SciCat's archiveId: the datablock's path below the LTS root, and its key in the retrieval bucket."""
    return f"{_DATASETS}/{dataset_id}/datablocks/{datablock_name(dataset_id, number)}"


def window_count(size_bytes: int) -> int:
    """Windows of a member; an empty file has one, so that its digest is recorded too."""
    return max(1, -(-size_bytes // WINDOW_BYTES))


def window_range(size_bytes: int, window: int) -> tuple[int, int]:
    """Half-open byte range of one window within its member."""
    start = window * WINDOW_BYTES
    return start, min(start + WINDOW_BYTES, size_bytes)
