"""Datablocks in SciCat: recorded once, whatever is lost on the way, and compared with what is there.

A POST is never repeated blindly. What it did is read back by the archiveId, which is unique in the whole catalogue.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Final

import anyio.to_thread
import msgspec

from mover.errors import (
    CatalogueAccessError,
    CatalogueConflictError,
    CatalogueTransientError,
    DatasetNotFoundError,
    MoverError,
)
from mover.model import Manifest, ManifestMember
from mover.scicat_http import SciCatSession, segment
from mover.scicat_locks import DatasetLocks
from mover.scicat_reply import Call, Reply
from mover.streams.hashing import ALGORITHM, digest_of

__all__ = ["Datablocks", "datablock_record"]

_CATALOGUE_ALGORITHMS: Final = ("sha256", "blake2b", "sha1", "md5")
_EARLIEST_S, _LATEST_S = -62_135_596_800, 253_402_300_799  # the years 1 and 9999
_LARGE_BODY_BYTES = 1 << 20  # what proxies refuse by default
_COMPARED = ("datasetId", "size", "packedSize", "chkAlg")


class Datablocks:
    """The datablocks of all datasets of a server."""

    def __init__(self, session: SciCatSession, locks: DatasetLocks) -> None:
        self._session, self._locks = session, locks

    async def register(self, dataset_id: str, manifest: Manifest) -> bool:
        """Records the datablock; False when it was recorded before, with the same content.

        Raises:
            CatalogueConflictError: it is recorded with another content.
            CatalogueAccessError: it is refused, or too large for one request.
            DatasetNotFoundError: there is no such dataset.
        """
        record, body = await anyio.to_thread.run_sync(_encoded, dataset_id, manifest)
        limit = self._session.access.max_body_bytes
        if len(body) > limit:
            reason = f"its record has {len(body):,} bytes, more than the {limit:,} that the catalogue takes"
            raise CatalogueAccessError("register", manifest.archive_id, reason)
        tried = False

        async def attempt() -> bool:
            nonlocal tried
            if await self._is_registered(record):
                return tried  # then it is the work of a try whose answer got lost
            tried = True
            await self._post(record, body)
            return True

        async with self._locks.writing(dataset_id):
            return await self._session.repeating(attempt)

    async def unregister(self, dataset_id: str, manifest: Manifest) -> None:
        """Takes the record back; one that is not there is fine.

        Raises:
            CatalogueConflictError: it belongs to another dataset.
        """
        async with self._locks.writing(dataset_id):
            await self._session.identity()  # nobody in particular would not see it
            stored = await self._find(manifest.archive_id, self._session.call)
            if stored is None:
                return
            if stored.get("datasetId") != dataset_id:
                raise CatalogueConflictError(manifest.archive_id, "datasetId", dataset_id, stored.get("datasetId"))
            server_id = str(stored.get("_id") or stored.get("id") or "")
            path = f"datasets/{segment(dataset_id)}/datablocks/{segment(server_id)}"
            reply = await self._session.call(Call("unregister", manifest.archive_id, "DELETE", path))
            if not reply.missing:
                reply.check()

    async def unregister_all(self, dataset_id: str) -> int:
        """Takes all datablocks of the dataset back at once, which also resets its counters; returns their number."""
        path = f"datasets/{segment(dataset_id)}/datablocks"
        async with self._locks.writing(dataset_id):
            reply = await self._session.call(Call("unregister all of", dataset_id, "DELETE", path))
        if reply.missing:
            return 0
        count = reply.record().get("count")
        return count if isinstance(count, int) else 0

    async def _post(self, record: dict[str, Any], body: bytes) -> None:
        """One attempt; an answer that got lost, or that says it is there, is compared with what is there."""
        call = Call("register", record["archiveId"], "POST", "datablocks", body=body)
        failure: MoverError
        try:
            reply = await self._session.call_once(call)
        except CatalogueTransientError as error:
            failure = _with_hint(error, len(body))
        else:
            if reply.missing:
                raise DatasetNotFoundError(record["datasetId"], "the catalogue")
            if reply.ok and isinstance(reply.value(), dict):
                return
            failure = reply.unreadable() if reply.ok else reply.refused()
            if not reply.ok and reply.status != 409:
                raise failure
        if not await self._is_registered(record):
            raise failure

    async def _is_registered(self, record: dict[str, Any]) -> bool:
        stored = await self._find(record["archiveId"], self._session.call_once)
        if stored is None:
            return False
        await anyio.to_thread.run_sync(_compare, record, stored)
        return True

    @staticmethod
    async def _find(archive_id: str, send: Callable[[Call], Awaitable[Reply]]) -> dict[str, Any] | None:
        query = msgspec.json.encode({"where": {"archiveId": archive_id}, "limits": {"limit": 2}}).decode()
        call = Call("look up datablock", archive_id, "GET", "datablocks", query={"filter": query})
        reply = await send(call)
        found = [item for item in reply.records() if item.get("archiveId") == archive_id]
        return found[0] if found else None


def datablock_record(dataset_id: str, manifest: Manifest) -> dict[str, Any]:
    """The datablock as SciCat keeps it.

    One algorithm holds for all files: the source's own, when all members were proved against the same one, as it is
    what others can compute; otherwise the digests of the manifest, which every member has. There, ``chk`` of a file of
    several windows is the digest of its windows' digests (their bytes, in order), with their number behind a hyphen,
    and so cannot be taken for a digest of the file itself.
    """
    algorithm = _common_algorithm(manifest)
    return {
        "archiveId": manifest.archive_id,
        "datasetId": dataset_id,
        "size": manifest.payload_bytes,
        "packedSize": manifest.size_bytes,
        "chkAlg": algorithm or ALGORITHM,
        "version": f"mover-{manifest.version}",
        "dataFileList": [_data_file(member, algorithm) for member in manifest.members],
    }


def _common_algorithm(manifest: Manifest) -> str:
    found = {member.checksum.algorithm if member.checksum else "" for member in manifest.members}
    algorithm = found.pop() if len(found) == 1 else ""
    return algorithm if algorithm in _CATALOGUE_ALGORITHMS else ""


def _data_file(member: ManifestMember, algorithm: str) -> dict[str, Any]:
    moment = datetime.fromtimestamp(min(max(member.mtime_s, _EARLIEST_S), _LATEST_S), UTC)
    return {
        "path": member.path,
        "size": member.size_bytes,
        "time": f"{moment:%Y-%m-%dT%H:%M:%S}.000Z",
        "chk": member.checksum.value if algorithm and member.checksum else _digest(member.windows),
    }


def _digest(windows: tuple[str, ...]) -> str:
    if len(windows) == 1:
        return windows[0]
    return f"{digest_of(b''.join(map(bytes.fromhex, windows)))}-{len(windows)}"


def _encoded(dataset_id: str, manifest: Manifest) -> tuple[dict[str, Any], bytes]:
    record = datablock_record(dataset_id, manifest)
    return record, msgspec.json.encode(record)


def _with_hint(error: CatalogueTransientError, body_bytes: int) -> CatalogueTransientError:
    """SciCat answers 500 to a body above its limit, as it does to anything unexpected."""
    if body_bytes <= _LARGE_BODY_BYTES:
        return error
    reason = f"{error.reason} (a body of {body_bytes:,} bytes; does the server take as much?)"
    return CatalogueTransientError(error.op, error.target, reason, error.retry_after_s)


def _compare(record: dict[str, Any], stored: dict[str, Any]) -> None:
    """Raises CatalogueConflictError for the first difference."""
    for name in _COMPARED:
        if stored.get(name) != record[name]:
            raise CatalogueConflictError(record["archiveId"], name, record[name], stored.get(name))
    ours, theirs = _rows(record["dataFileList"]), _rows(stored.get("dataFileList"))
    if len(ours) != len(theirs):
        raise CatalogueConflictError(record["archiveId"], "number of files", len(ours), len(theirs))
    for own, their in zip(ours, theirs, strict=True):
        if own != their:
            raise CatalogueConflictError(record["archiveId"], "file list", own, their)


def _rows(entries: object) -> list[tuple[str, Any, str]]:
    """Path, size and digest of each file, sorted."""
    listed = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    rows = [(str(entry.get("path")), entry.get("size"), str(entry.get("chk") or "")) for entry in listed]
    return sorted(rows, key=lambda row: row[0])
