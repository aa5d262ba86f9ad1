"""What is proved about a datablock: its read-back, the source's claims about its members, the manifest that says so."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import anyio

from mover import __version__
from mover.errors import LtsError
from mover.model import (
    Datablock,
    DatasetPlan,
    Evidence,
    EvidenceLevel,
    Manifest,
    ManifestMember,
    Member,
    SourceChecksum,
    Stage,
    archive_id,
    datablock_name,
    raw_files_prefix,
    raw_object_key,
    window_count,
)
from mover.parts import Parts, now_iso
from mover.streams.checksums import is_computable
from mover.streams.hashing import ALGORITHM, labelled
from mover.streams.lts import LtsFolder
from mover.streams.lts_read import open_when_online
from mover.streams.units import WindowKey
from mover.tasks import open_task_group
from mover.verify import Break, ReadBack, ReadBackResult, read_back

__all__ = ["claimed_checksums", "describe", "read_back_datablock", "real_breaks"]

_LOOKUPS = 8


async def claimed_checksums(parts: Parts, plan: DatasetPlan, datablock: Datablock) -> dict[str, SourceChecksum]:
    """What the catalogue, or else the S3 server, claims for each member, by path: none for those without a claim.

    A claim in an algorithm that cannot be computed here is no claim: the manifest lists only what was found true.
    """
    bucket = parts.buckets.landing_zone
    members = iter(datablock.members)
    found: dict[str, SourceChecksum] = {}

    async def look_up() -> None:
        for member in members:  # shared: each task takes the next one
            claim = plan.checksums.get(member.path)
            if claim is None or not is_computable(claim.algorithm):
                key = raw_object_key(datablock.dataset_id, member.path)
                claim = await parts.store.source_checksum(bucket, key, member.etag, member.size_bytes)
            if claim is not None and is_computable(claim.algorithm):
                found[member.path] = claim

    async with open_task_group() as tasks:
        for _ in range(_LOOKUPS):
            tasks.start_soon(look_up)
    return found


async def read_back_datablock(
    parts: Parts,
    folder: LtsFolder,
    datablock: Datablock | Manifest,
    windows: Mapping[WindowKey, str],
    checksums: Mapping[str, SourceChecksum],
) -> tuple[Evidence, ReadBackResult]:
    """Reads one datablock back from the storage. The caller holds a slot of VERIFY_LTS_LIMIT.

    Raises:
        LtsError: it cannot be read, or this host's page cache cannot be kept out of it.
        LayoutMismatchError: its size is another one.
    """
    announcer = parts.announcer(datablock.dataset_id, Stage.VERIFY, datablock.number, datablock.size_bytes)
    path = folder.datablock_path(datablock_name(datablock.dataset_id, datablock.number))
    reader = await open_when_online(path, datablock.size_bytes, policy=parts.recall, on_wait=announcer.waiting)
    try:
        cache = await parts.on_lts(reader.drop_cache)
        if not cache:
            raise LtsError("verify", str(path), "this host's page cache cannot be kept out of the read-back")
        comparison = ReadBack(datablock, windows, checksums)
        async with announcer.following(lambda: comparison.fed_bytes):
            result = await read_back(
                reader, comparison, datablock.size_bytes, parts.lanes.pool, stall_timeout_s=parts.stall_timeout_s
            )
    finally:
        with anyio.CancelScope(shield=True):
            await parts.on_lts(reader.close)
    parts.tally.add(Stage.VERIFY, len(datablock.members))
    level = EvidenceLevel.RECALLED if reader.was_offline else EvidenceLevel.READ_BACK
    return Evidence(level, now_iso(), socket.gethostname(), labelled(result.digest), cache), result


async def real_breaks(
    parts: Parts, dataset_id: str, result: ReadBackResult, checksums: dict[str, SourceChecksum]
) -> list[Break]:
    """The breaks without those of ETags that turn out to be no MD5s, as of objects that the server encrypts.

    Such claims are removed from ``checksums``: nothing was proved by them.
    """
    real = []
    for broken in result.breaks:
        claimed = checksums.get(broken.path) if broken.algorithm != ALGORITHM else None
        if claimed is not None and claimed.origin == "s3-etag":
            key = raw_object_key(dataset_id, broken.path)
            if not await parts.store.etag_is_md5(parts.buckets.landing_zone, key):
                del checksums[broken.path]
                continue
        real.append(broken)
    return real


def describe(
    plan: DatasetPlan,
    datablock: Datablock,
    windows: Mapping[WindowKey, str],
    checksums: Mapping[str, SourceChecksum],
    evidence: Evidence,
    *,
    target_bytes: int,
    bucket: str,
) -> Manifest:
    """The manifest of a datablock that was read back."""
    return Manifest(
        dataset_id=datablock.dataset_id,
        number=datablock.number,
        datablock_count=len(plan.datablocks),
        archive_id=archive_id(datablock.dataset_id, datablock.number),
        fingerprint=plan.fingerprint,
        target_bytes=target_bytes,
        size_bytes=datablock.size_bytes,
        payload_bytes=datablock.payload_bytes,
        digest=evidence.digest,
        members=tuple(
            _describe_member(datablock.dataset_id, index, member, windows, checksums.get(member.path))
            for index, member in enumerate(datablock.members)
        ),
        evidence=(evidence,),
        created_at=now_iso(),
        software=f"mover {__version__}",
        source=f"s3://{bucket}/{raw_files_prefix(datablock.dataset_id)}",
    )


def _describe_member(
    dataset_id: str,
    index: int,
    member: Member,
    windows: Mapping[WindowKey, str],
    checksum: SourceChecksum | None,
) -> ManifestMember:
    return ManifestMember(
        path=member.path,
        key=raw_object_key(dataset_id, member.path),
        etag=member.etag,
        size_bytes=member.size_bytes,
        mtime_s=member.mtime_s,
        offset_bytes=member.offset_bytes,
        header_bytes=member.header_bytes,
        windows=tuple(windows[index, window] for window in range(window_count(member.size_bytes))),
        checksum=checksum,
    )
