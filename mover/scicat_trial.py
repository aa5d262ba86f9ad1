"""What uploaders and scientists do in SciCat, for trying a deployment: announce a dataset, order a job."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from mover.catalogue import JobDataset
from mover.errors import CatalogueAccessError
from mover.model import CatalogueFile
from mover.scicat_http import SciCatSession
from mover.scicat_reply import Call, Reply

__all__ = ["Trial"]

_FILES_PER_BLOCK: Final = 20_000
_OWNER_GROUP: Final = "mover-trial"
_PERM: Final = "-rw-r--r--"


class Trial:
    """Acts with the mover's own account, which needs the right to create datasets and jobs."""

    def __init__(self, session: SciCatSession) -> None:
        self._session = session

    async def announce(self, dataset_id: str, files: Sequence[CatalogueFile]) -> None:
        """Creates a dataset whose upload is finished, with the list of its files, whose sizes the server adds up.

        Raises:
            CatalogueAccessError: the server refuses, or the dataset is there already.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        dataset = {
            "pid": dataset_id,
            "type": "raw",
            "datasetName": f"trial {dataset_id}",
            "sourceFolder": f"/trial/{dataset_id}",
            "owner": "mover",
            "contactEmail": "mover@localhost.localdomain",
            "principalInvestigator": "mover",
            "creationLocation": "/mover/trial",
            "creationTime": now,
            "ownerGroup": _OWNER_GROUP,
            "accessGroups": [],
            "datasetlifecycle": {
                "archivable": True,
                "archiveStatusMessage": "datasetCreated",
                "isOnCentralDisk": False,
            },
        }
        await self._create("create dataset", dataset_id, "datasets", dataset)
        for block in _batched(files, _FILES_PER_BLOCK):
            entries = [
                {"path": file.path, "size": file.size_bytes, "time": now, "perm": "-rw-r--r--"} for file in block
            ]
            body = {"datasetId": dataset_id, "size": sum(file.size_bytes for file in block), "dataFileList": entries}
            await self._create("list the files of", dataset_id, "origdatablocks", body)

    async def order(self, kind: str, datasets: Iterable[JobDataset]) -> str:
        """Creates a job as a scientist does; returns its id.  Raises CatalogueAccessError."""
        chosen = list(datasets)
        wanted = [{"pid": dataset.dataset_id, "files": list(dataset.files)} for dataset in chosen]
        body = {
            "type": kind,
            "ownerGroup": _OWNER_GROUP,
            "contactEmail": "mover@localhost.localdomain",
            "jobParams": {"username": self._session.access.user, "datasetList": wanted},
        }
        target = ", ".join(dataset.dataset_id for dataset in chosen)
        reply = await self._create(f"order {kind} of", target, "jobs", body, v4=True)
        return str(reply.record()["id"])

    async def _create(self, op: str, target: str, path: str, body: dict[str, Any], *, v4: bool = False) -> Reply:
        call = Call(op, target, "POST", path, api="v4" if v4 else "v3", body=msgspec.json.encode(body))
        reply = await self._session.call_once(call)
        if not reply.ok:
            raise CatalogueAccessError(op, target, reply.reason)
        return reply


def _batched(files: Sequence[CatalogueFile], count: int) -> Iterable[Sequence[CatalogueFile]]:
    for start in range(0, len(files), count):
        yield files[start : start + count]
