"""Where a dataset stands in SciCat: changes merged into what is there, and read back.

Releases before 4.19 have no route that merges: a change of the dataset replaces the whole lifecycle and resets what it
does not name. There the lifecycle is read, changed here, and written back as a whole.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from mover.catalogue import Lifecycle
from mover.errors import CatalogueTransientError, DatasetNotFoundError
from mover.scicat_files import read_dataset
from mover.scicat_http import SciCatSession, segment
from mover.scicat_locks import DatasetLocks
from mover.scicat_reply import Call, Reply

__all__ = ["Lifecycles"]

_NAMES = {
    "archivable": "archivable",
    "retrievable": "retrievable",
    "archive_status_message": "archiveStatusMessage",
    "retrieve_status_message": "retrieveStatusMessage",
    "archive_return_message": "archiveReturnMessage",
    "retrieve_return_message": "retrieveReturnMessage",
    "retrieve_integrity_check": "retrieveIntegrityCheck",
}
_TYPES: dict[str, type] = {
    "archivable": bool,
    "retrievable": bool,
    "archive_status_message": str,
    "retrieve_status_message": str,
    "retrieve_integrity_check": bool,
}
_READ = "read lifecycle of"
_SERVERS_OWN = frozenset({"_id", "id", "__v"})


class Lifecycles:
    """The lifecycles of all datasets of a server."""

    def __init__(self, session: SciCatSession, locks: DatasetLocks) -> None:
        self._session, self._locks = session, locks
        self._reads = self._merges = True  # until the server is found to be too old

    async def read(self, dataset_id: str) -> Lifecycle:
        """Where the dataset stands.  Raises DatasetNotFoundError."""
        return _lifecycle(await self._stored(dataset_id, self._session.call))

    async def update(self, dataset_id: str, change: Lifecycle) -> None:
        """Changes the fields that are not None and reads back; a change that another writer undid is repeated.

        Raises:
            DatasetNotFoundError: there is no such dataset.
            CatalogueTransientError: the change does not stay.
        """
        wanted = {wire: value for name, wire in _NAMES.items() if (value := getattr(change, name)) is not None}
        if not wanted:
            return

        async def write() -> None:
            if not (self._merges and await self._merge(dataset_id, wanted)):
                await self._replace(dataset_id, wanted)
            stored = await self._stored(dataset_id, self._session.call_once)
            lost = sorted(name for name, value in wanted.items() if stored.get(name) != value)
            if lost:
                raise _lost(dataset_id, lost)

        async with self._locks.writing(dataset_id):
            await self._session.repeating(write)

    async def _stored(self, dataset_id: str, send: Callable[[Call], Awaitable[Reply]]) -> dict[str, Any]:
        if self._reads:
            reply = await send(Call(_READ, dataset_id, "GET", f"datasets/{segment(dataset_id)}/datasetlifecycle"))
            if not reply.no_route:
                self._check(reply, dataset_id)
                return reply.record()
        stored = (await read_dataset(send, dataset_id, _READ)).get("datasetlifecycle")
        self._reads = False  # a proxy that decodes %2F looks the same, but then the dataset cannot be read either
        return stored if isinstance(stored, dict) else {}

    async def _merge(self, dataset_id: str, wanted: dict[str, Any]) -> bool:
        """Whether the server knows how to; then it is done."""
        reply = await self._patch(dataset_id, "/datasetlifecycle", wanted)
        if reply.no_route:
            await read_dataset(self._session.call_once, dataset_id, _READ)
            self._merges = False
            return False
        self._check(reply, dataset_id)
        return True

    async def _replace(self, dataset_id: str, wanted: dict[str, Any]) -> None:
        stored = await self._stored(dataset_id, self._session.call_once)
        kept = {name: value for name, value in stored.items() if name not in _SERVERS_OWN and value is not None}
        self._check(await self._patch(dataset_id, "", {"datasetlifecycle": kept | wanted}), dataset_id)

    async def _patch(self, dataset_id: str, below: str, body: dict[str, Any]) -> Reply:
        path = f"datasets/{segment(dataset_id)}{below}"
        call = Call("update lifecycle of", dataset_id, "PATCH", path, body=msgspec.json.encode(body))
        return await self._session.call_once(call)

    @staticmethod
    def _check(reply: Reply, dataset_id: str) -> None:
        if reply.missing:
            raise DatasetNotFoundError(dataset_id, "the catalogue")
        reply.check()


def _lifecycle(stored: dict[str, Any]) -> Lifecycle:
    """Leniently: a field of another type, which SciCat lets through on some routes, is as good as none."""
    fields: dict[str, Any] = {
        name: value for name, wire in _NAMES.items() if isinstance(value := stored.get(wire), _TYPES.get(name, dict))
    }
    return Lifecycle(**fields)


def _lost(dataset_id: str, names: list[str]) -> CatalogueTransientError:
    reason = f"{', '.join(names)} did not stay as written; is there another writer?"
    return CatalogueTransientError("update lifecycle of", dataset_id, reason)
