"""Rebuilds one damaged datablock, byte for byte as its manifest proves it, from its source or its retrieval copy."""

from __future__ import annotations

import logging
from functools import partial

import anyio

from mover.datablock import from_landing_zone, move_counters
from mover.errors import (
    DatasetNotFoundError,
    DigestMismatchError,
    IntegrityError,
    ObjectChangedError,
    ObjectMissingError,
)
from mover.model import Manifest, Stage, dataset_folder
from mover.parts import Parts, hold_dataset
from mover.policies.names import check_dataset_id
from mover.proof import read_back_datablock
from mover.reports import ByteCounters, DatablockReport
from mover.staging import from_datablock_object
from mover.streams.hashing import ALGORITHM
from mover.streams.lts import LtsFolder
from mover.streams.lts_writer import LtsWriter
from mover.streams.pipe import Locate, Move
from mover.streams.units import WindowKey
from mover.verification import committed_manifests, expected_checksums, expected_windows
from mover.verify import raise_breaks

__all__ = ["repair_datablock"]

_log = logging.getLogger(__name__)


async def repair_datablock(parts: Parts, dataset_id: str, number: int) -> DatablockReport:
    """Writes the datablock beside the damaged one, compares every window with the manifest, and takes its place.

    The retrieval copy is used when there is one of the right size, else the objects of the landing zone. The manifest
    stays as it is: the rebuilt file is the one that it describes, or nothing changes.

    Raises:
        DatasetNotFoundError: no such datablock.
        ObjectMissingError, ObjectChangedError: there is nothing left to rebuild it from.
        DigestMismatchError: what there is does not give the bytes of the manifest.
    """
    check_dataset_id(dataset_id)
    async with hold_dataset(parts, dataset_id) as folder:
        manifest = await _manifest(parts, folder, number)
        counters = ByteCounters()
        began = anyio.current_time()
        async with parts.space.admit(manifest.size_bytes), parts.limits.move_to_lts.slot(manifest.archive_id):
            await _rebuild(parts, folder, manifest, counters)
        moved = anyio.current_time()
        async with parts.limits.verify_lts.slot(manifest.archive_id):
            windows, checksums = expected_windows(manifest), expected_checksums(manifest)
            evidence, result = await read_back_datablock(parts, folder, manifest, windows, checksums)
        counters.lts_read_bytes += manifest.size_bytes
        if result.breaks:
            raise_breaks(result.breaks)
    return DatablockReport(
        number=number,
        name=manifest.name,
        size_bytes=manifest.size_bytes,
        payload_bytes=manifest.payload_bytes,
        members=len(manifest.members),
        outcome="written",
        digest=evidence.digest,
        evidence=evidence.level,
        move_s=moved - began,
        verify_s=anyio.current_time() - moved,
        counters=counters,
    )


async def _manifest(parts: Parts, folder: LtsFolder, number: int) -> Manifest:
    for manifest in await committed_manifests(parts, folder):
        if manifest.number == number:
            return manifest
    raise DatasetNotFoundError(folder.dataset_id, f"datablock {number} of {dataset_folder(folder.dataset_id)}")


async def _rebuild(parts: Parts, folder: LtsFolder, manifest: Manifest, counters: ByteCounters) -> None:
    """From the retrieval copy where there is one; when that is damaged, or gone, from the landing zone."""
    copy = await _retrieval_copy(parts, manifest)
    if copy is not None:
        try:
            await _write(parts, folder, manifest, counters, copy, "the retrieval copy")
        except (IntegrityError, ObjectMissingError, ObjectChangedError) as exc:
            _log.warning("the retrieval copy of %s is of no use: %s", manifest.archive_id, exc)
        else:
            return
    source = from_landing_zone(parts.buckets.landing_zone, manifest.dataset_id)
    await _write(parts, folder, manifest, counters, source, "the landing zone")


async def _retrieval_copy(parts: Parts, manifest: Manifest) -> Locate | None:
    bucket, key = parts.buckets.retrieval, manifest.archive_id
    try:
        copy = await parts.store.head(bucket, key)
    except ObjectMissingError:
        return None
    if copy.size_bytes != manifest.size_bytes:
        return None
    return from_datablock_object(bucket, key, copy.etag, copy.size_bytes)


async def _write(
    parts: Parts, folder: LtsFolder, manifest: Manifest, counters: ByteCounters, locate: Locate, side: str
) -> None:
    name = manifest.name
    opening = partial(folder.open_writer, name, manifest.size_bytes, resume=False, replace_committed=True)
    writer: LtsWriter = await parts.on_lts(opening)
    committed = False
    try:
        move = Move(manifest, writer, parts.lanes, locate, lambda _windows: None, {})
        stage = parts.announcer(manifest.dataset_id, Stage.MOVE, manifest.number, manifest.size_bytes)
        async with stage.following(lambda: writer.written_bytes):
            await move.run()
        _compare(manifest, move.digests, side)
        await parts.on_lts(writer.commit)
        committed = True
        counters.add(move_counters(move, writer, staging=False))
    finally:
        with anyio.CancelScope(shield=True):
            await parts.on_lts(writer.close)
            if not committed:
                await parts.on_lts(folder.discard, name)


def _compare(manifest: Manifest, digests: dict[WindowKey, str], side: str) -> None:
    for (index, window), expected in expected_windows(manifest).items():
        found = digests[index, window]
        if found != expected:
            where = f"{manifest.archive_id}, member {manifest.members[index].path!r}, window {window}"
            raise DigestMismatchError(where, ALGORITHM, expected, found, side)
