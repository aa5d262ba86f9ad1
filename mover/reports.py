"""What a run tells afterwards: frozen records that the command line prints and ``--json`` encodes."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import msgspec

from mover.model import Anomaly

__all__ = [
    "ArchiveReport",
    "ByteCounters",
    "DatablockReport",
    "DatasetListing",
    "ReleaseReport",
    "RetrieveReport",
    "RetrievedObject",
    "Tally",
    "VerifyReport",
]


class ByteCounters(msgspec.Struct):
    """Bytes moved by one run, by place. A retried byte counts each time.

    ``reused_bytes`` is payload that an earlier run had made durable and that was not fetched again.
    """

    landing_zone_read_bytes: int = 0
    staging_written_bytes: int = 0
    staging_read_bytes: int = 0
    lts_written_bytes: int = 0
    lts_read_bytes: int = 0
    retrieval_written_bytes: int = 0
    scratch_payload_bytes: int = 0
    reused_bytes: int = 0

    def add(self, other: ByteCounters) -> None:
        """Adds another record field by field."""
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Tally(msgspec.Struct):
    """What an engine has done since it was opened, counted where it happens.

    Each by stage: objects that were moved, read back or retrieved; datablocks; datablocks that were not what they
    have to be, also those that were mended afterwards.
    """

    objects: Counter[str] = msgspec.field(default_factory=Counter)
    datablocks: Counter[str] = msgspec.field(default_factory=Counter)
    mismatches: Counter[str] = msgspec.field(default_factory=Counter)

    def add(self, stage: str, objects: int) -> None:
        """Counts one datablock with so many objects."""
        self.objects[stage] += objects
        self.datablocks[stage] += 1


class DatablockReport(msgspec.Struct, frozen=True):
    """One datablock. ``outcome``: ``written``, ``resumed`` (windows were durable before), ``adopted`` (all was).

    Times are seconds of waiting for space and limits, of moving and of reading back.
    """

    number: int
    name: str
    size_bytes: int
    payload_bytes: int
    members: int
    outcome: Literal["written", "resumed", "adopted"]
    digest: str
    evidence: str
    wait_s: float = 0.0
    move_s: float = 0.0
    verify_s: float = 0.0
    counters: ByteCounters = msgspec.field(default_factory=ByteCounters)


class ReleaseReport(msgspec.Struct, frozen=True):
    """Source objects that were deleted, and (path, reason) of those that were left alone."""

    deleted: int
    kept: tuple[tuple[str, str], ...] = ()


class ArchiveReport(msgspec.Struct, frozen=True):
    """A dataset that is archived: all datablocks have manifests with read-back evidence."""

    dataset_id: str
    file_count: int
    payload_bytes: int
    size_bytes: int
    datablocks: tuple[DatablockReport, ...]
    counters: ByteCounters
    elapsed_s: float
    anomalies: tuple[Anomaly, ...] = ()
    release: ReleaseReport | None = None


class VerifyReport(msgspec.Struct, frozen=True):
    """A dataset whose datablocks were read again and agree with their manifests.

    ``datablock_count``: how many the dataset has when it is whole; fewer are here while its archival is not finished.
    """

    dataset_id: str
    level: str
    datablocks: tuple[DatablockReport, ...]
    counters: ByteCounters
    elapsed_s: float
    datablock_count: int = 0


class RetrievedObject(msgspec.Struct, frozen=True):
    """One object of the retrieval bucket. ``digest`` is ``<algorithm>:<hex>`` of its bytes; ``url`` is a secret.

    ``sha256``: the checksum that a download can be checked with anywhere; '' when the object was there already.
    """

    key: str
    size_bytes: int
    digest: str
    sha256: str
    url: str
    outcome: Literal["written", "adopted"]


class RetrieveReport(msgspec.Struct, frozen=True):
    """A dataset, or files of it, in the retrieval bucket."""

    dataset_id: str
    form: Literal["datablocks", "files"]
    objects: tuple[RetrievedObject, ...]
    counters: ByteCounters
    elapsed_s: float
    expires_at: str
    script: str = ""  # download script; holds the links, so it is a secret, too


class DatasetListing(msgspec.Struct, frozen=True):
    """One dataset on the LTS, from its manifests alone."""

    dataset_id: str
    datablocks: int
    datablock_count: int
    file_count: int
    payload_bytes: int
    size_bytes: int
    archived_at: str
    problem: str = ""  # a manifest that cannot be used; the numbers are then those of the others
