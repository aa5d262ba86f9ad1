"""The only code that deletes: sources that are proved to be archived, and staging copies of what is on the LTS.

A deletion takes a manifest as its key: with read-back evidence, naming exactly the object's key, size and ETag.
"""

from __future__ import annotations

from collections.abc import Sequence

from mover.errors import ManifestError, ObjectAccessError
from mover.model import EvidenceLevel, Manifest, ManifestMember, raw_files_prefix
from mover.reports import ReleaseReport
from mover.streams.interfaces import ObjectStore

__all__ = ["Registered", "empty_staging_copy", "is_proved", "release_source"]

_PROOFS = {EvidenceLevel.READ_BACK, EvidenceLevel.RECALLED}


class Registered:
    """A manifest that the catalogue has accepted. Made only by the step that registers, for ``release_source``."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest


def is_proved(manifest: Manifest) -> bool:
    """Whether the manifest says that the datablock was read back from the storage, with the digest that it names."""
    return any(
        evidence.level in _PROOFS and evidence.digest == manifest.digest and bool(evidence.cache)
        for evidence in manifest.evidence
    )


async def release_source(store: ObjectStore, bucket: str, registered: Sequence[Registered]) -> ReleaseReport:
    """Deletes the source objects of registered datablocks; lists the bucket again right before.

    An object that is not exactly the archived one (its ETag or size changed), or that no manifest names, is left alone
    and reported. Objects that are gone already count as deleted in an earlier run, not in this one.

    Raises:
        ManifestError: a manifest without read-back evidence; nothing is deleted then.
    """
    for token in registered:
        if not is_proved(token.manifest):
            raise ManifestError(token.manifest.archive_id, "it holds no read-back evidence; the source stays")
    if not registered:
        return ReleaseReport(0)
    dataset_id = registered[0].manifest.dataset_id
    prefix = raw_files_prefix(dataset_id)
    archived = {member.key: member for token in registered for member in token.manifest.members}
    kept: list[tuple[str, str]] = []
    keys: list[str] = []
    async for item in store.list_objects(bucket, prefix):
        member = archived.get(prefix + item.path)
        reason = _why_kept(member, item.size_bytes, item.etag)
        if reason:
            kept.append((item.path, reason))
        else:
            keys.append(prefix + item.path)
    result = await store.delete(bucket, keys)
    kept += [(key.removeprefix(prefix), reason) for key, reason in result.failed]
    return ReleaseReport(len(result.deleted), tuple(kept))


async def empty_staging_copy(store: ObjectStore, bucket: str, manifest: Manifest) -> None:
    """Deletes a datablock's copy in the staging bucket, after the datablock was read back from the LTS.

    Raises:
        ManifestError: the manifest holds no read-back evidence.
        ObjectAccessError: the server refuses.
    """
    if not is_proved(manifest):
        raise ManifestError(manifest.archive_id, "it holds no read-back evidence; the staging copy stays")
    result = await store.delete(bucket, [manifest.archive_id])
    for key, reason in result.failed:
        raise ObjectAccessError("DELETE", f"s3://{bucket}/{key}", reason)


def _why_kept(member: ManifestMember | None, size_bytes: int, etag: str) -> str:
    if member is None:
        return "not in a manifest"
    if (member.size_bytes, member.etag) != (size_bytes, etag):
        return "changed since it was archived"
    return ""
