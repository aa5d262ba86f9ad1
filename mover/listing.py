"""What is on the LTS, from manifests alone: a datablock without one does not exist."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from mover.errors import DatasetNotFoundError, ManifestError
from mover.model import ManifestMember, dataset_folder
from mover.parts import Parts, decode_manifest
from mover.policies.names import check_dataset_id
from mover.reports import DatasetListing
from mover.streams.lts import list_datasets
from mover.verification import committed_manifests

__all__ = ["list_archived", "list_members"]


async def list_archived(parts: Parts, dataset_id: str | None = None) -> AsyncIterator[DatasetListing]:
    """Every dataset that has manifests, one after another, in the order of the folders; or the one that is named.

    Raises:
        DatasetNotFoundError: the named one has no manifests.
    """
    if dataset_id is not None:
        check_dataset_id(dataset_id)
        folder = parts.folder(dataset_id)
        if not await parts.on_lts(folder.manifest_names):
            raise DatasetNotFoundError(dataset_id, f"{parts.lts_root}/{dataset_folder(dataset_id)}")
        yield await _summarise(parts, dataset_id)
        return
    found: Iterator[str] = await parts.on_lts(list_datasets, parts.lts_root)
    while (dataset_id := await parts.on_lts(next, found, None)) is not None:
        yield await _summarise(parts, dataset_id)


async def list_members(parts: Parts, dataset_id: str) -> AsyncIterator[tuple[int, ManifestMember]]:
    """(number of the datablock, member) of every file.  Raises DatasetNotFoundError."""
    check_dataset_id(dataset_id)
    for manifest in await committed_manifests(parts, parts.folder(dataset_id)):
        for member in manifest.members:
            yield manifest.number, member


async def _summarise(parts: Parts, dataset_id: str) -> DatasetListing:
    folder = parts.folder(dataset_id)
    datablocks = count = files = payload_bytes = size_bytes = 0
    archived_at = problem = ""
    for name in await parts.on_lts(folder.manifest_names):
        data = await parts.on_lts(folder.read_manifest, name)
        if data is not None:
            try:
                manifest = await parts.on_lts(decode_manifest, data, name, dataset_id)
            except ManifestError as exc:
                problem = str(exc)
                continue
            datablocks += 1
            count = manifest.datablock_count
            files += len(manifest.members)
            payload_bytes += manifest.payload_bytes
            size_bytes += manifest.size_bytes
            archived_at = max(archived_at, manifest.created_at)
    return DatasetListing(dataset_id, datablocks, count, files, payload_bytes, size_bytes, archived_at, problem)
