"""Verification of archived datasets: their datablocks against their manifests, as weak or as strong as asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import anyio

from mover.errors import DatasetNotFoundError, DigestMismatchError, IntegrityError, LayoutMismatchError, LtsError
from mover.model import Evidence, EvidenceLevel, Manifest, SourceChecksum, Stage, dataset_folder
from mover.parts import Parts, read_manifests
from mover.policies.names import check_dataset_id
from mover.proof import read_back_datablock
from mover.reports import ByteCounters, DatablockReport, VerifyReport
from mover.streams.hashing import ALGORITHM
from mover.streams.lts import LtsFolder
from mover.streams.units import WindowKey
from mover.tasks import open_task_group
from mover.verify import ReadBackResult, raise_breaks

__all__ = [
    "DamagedDatasetError",
    "DatablockGoneError",
    "NotRecalledError",
    "VerifyLevel",
    "committed_manifests",
    "expected_checksums",
    "expected_windows",
    "verify_datablock",
    "verify_dataset",
]

_SHOWN = 20  # of damaged datablocks, with what is wrong; all are named by their numbers

VerifyLevel = Literal["written", "read-back", "recalled"]
"""``written``: sizes only, no byte is read; ``read-back``: every byte; ``recalled``: as that, from tape."""


class NotRecalledError(LtsError):
    """A datablock was on disk, though the proof was to be read from tape: reading it again proves no more."""

    retryable = False

    def __init__(self, name: str) -> None:
        super().__init__("verify", name, "its bytes agree, but it was on disk: this proves nothing about the tape")


class DatablockGoneError(IntegrityError):
    """A manifest is there without its datablock."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path}: it has a manifest, but the datablock is gone")


class DamagedDatasetError(IntegrityError):
    """Datablocks of a dataset are not what their manifests prove; ``damage`` says by number what is wrong with each."""

    def __init__(self, dataset_id: str, total: int, damage: Mapping[int, IntegrityError]) -> None:
        self.dataset_id, self.damage = dataset_id, dict(sorted(damage.items()))
        shown = [str(error) for error in list(self.damage.values())[:_SHOWN]]
        more = [f"and {len(self.damage) - _SHOWN:,} more"] if len(self.damage) > _SHOWN else []
        numbers = ", ".join(map(str, self.damage))
        super().__init__(
            f"{len(self.damage):,} of {total:,} datablock(s) damaged: {'; '.join([*shown, *more])}. The others were"
            f" looked at, too. `mover repair {dataset_id} --datablock N` rebuilds one; damaged: {numbers}"
        )


async def verify_dataset(parts: Parts, dataset_id: str, level: VerifyLevel) -> VerifyReport:
    """Compares all datablocks of a dataset with their manifests, also after a damaged one; reads only.

    Raises:
        DatasetNotFoundError: the dataset has no manifests.
        DamagedDatasetError: datablocks are not what their manifests prove, or are gone.
        LtsError: a datablock cannot be read.
        NotRecalledError: it is on disk, though ``recalled`` was asked for.
    """
    began = anyio.current_time()
    check_dataset_id(dataset_id)
    folder = parts.folder(dataset_id)
    manifests = await committed_manifests(parts, folder)
    reports: list[DatablockReport] = []
    damage: dict[int, IntegrityError] = {}

    async def verify(manifest: Manifest) -> None:
        try:
            reports.append(await verify_datablock(parts, folder, manifest, level))
        except IntegrityError as error:
            damage[manifest.number] = error

    async with open_task_group() as tasks:
        for manifest in manifests:
            tasks.start_soon(verify, manifest)
    if damage:
        raise DamagedDatasetError(dataset_id, len(manifests), damage)
    counters = ByteCounters()
    for report in reports:
        counters.add(report.counters)
    ordered = tuple(sorted(reports, key=lambda report: report.number))
    count = max(manifest.datablock_count for manifest in manifests)
    return VerifyReport(dataset_id, level, ordered, counters, anyio.current_time() - began, count)


async def committed_manifests(parts: Parts, folder: LtsFolder) -> list[Manifest]:
    """The manifests of a dataset that has been archived, wholly or in part.  Raises DatasetNotFoundError."""
    manifests = await read_manifests(parts, folder)
    if not manifests:
        raise DatasetNotFoundError(folder.dataset_id, f"{parts.lts_root}/{dataset_folder(folder.dataset_id)}")
    return manifests


def expected_windows(manifest: Manifest) -> dict[WindowKey, str]:
    """Every window's digest as the manifest has it."""
    return {
        (index, window): digest
        for index, member in enumerate(manifest.members)
        for window, digest in enumerate(member.windows)
    }


def expected_checksums(manifest: Manifest) -> Mapping[str, SourceChecksum]:
    """The source's checksums that were found true when the datablock was archived, by path."""
    return {member.path: member.checksum for member in manifest.members if member.checksum is not None}


async def verify_datablock(parts: Parts, folder: LtsFolder, manifest: Manifest, level: VerifyLevel) -> DatablockReport:
    """One datablock of ``verify_dataset``.

    Raises:
        LayoutMismatchError, DigestMismatchError, DatablockGoneError: it is not what its manifest proves.
        LtsError, NotRecalledError: as ``verify_dataset``.
    """
    name = manifest.name
    size_bytes = await parts.on_lts(folder.datablock_size, name)
    if size_bytes is None:
        raise DatablockGoneError(str(folder.datablock_path(name)))
    if level == "written":
        if size_bytes != manifest.size_bytes:
            raise LayoutMismatchError(name, "size in bytes", manifest.size_bytes, size_bytes)
        return _report(manifest, name, EvidenceLevel.WRITTEN, 0.0, 0.0, ByteCounters())
    queued = anyio.current_time()
    began = queued

    async def read_back() -> tuple[Evidence, ReadBackResult]:
        nonlocal began
        began = anyio.current_time()
        checksums = expected_checksums(manifest)
        return await read_back_datablock(parts, folder, manifest, expected_windows(manifest), checksums)

    evidence, result = await parts.limited(parts.limits.verify_lts, Stage.VERIFY, name, read_back)
    if result.breaks or evidence.digest != manifest.digest:
        parts.tally.mismatches[Stage.VERIFY] += 1
    if result.breaks:
        raise_breaks(result.breaks)
    if evidence.digest != manifest.digest:
        raise DigestMismatchError(name, ALGORITHM, manifest.digest, evidence.digest, "the LTS")
    if level == "recalled" and evidence.level is not EvidenceLevel.RECALLED:
        raise NotRecalledError(name)
    counters = ByteCounters(lts_read_bytes=manifest.size_bytes)
    return _report(manifest, name, evidence.level, began - queued, anyio.current_time() - began, counters)


def _report(
    manifest: Manifest, name: str, level: EvidenceLevel, wait_s: float, verify_s: float, counters: ByteCounters
) -> DatablockReport:
    return DatablockReport(
        number=manifest.number,
        name=name,
        size_bytes=manifest.size_bytes,
        payload_bytes=manifest.payload_bytes,
        members=len(manifest.members),
        outcome="adopted",
        digest=manifest.digest,
        evidence=level,
        wait_s=wait_s,
        verify_s=verify_s,
        counters=counters,
    )
