"""Datasets as the Ingestor leaves them in the catalogue, and jobs as a user orders them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta, timezone
from pathlib import PurePosixPath
from typing import Literal

import msgspec

from tests.scicat_fake.datasets import insert_dataset
from tests.scicat_fake.jobs import insert_job
from tests.scicat_fake.origdatablocks import insert_origdatablock
from tests.scicat_fake.state import Document, State

__all__ = [
    "FILES_PER_BLOCK",
    "SeedFile",
    "dataset_body",
    "file_entries",
    "origdatablock_bodies",
    "seed_dataset",
    "seed_job",
]

FILES_PER_BLOCK = 20_000
BYTES_PER_BLOCK = 200_000_000_000
_DIRECTORY_BYTES = 4096
_MTIME_S = 1_750_000_000
_OFFSET = timezone(timedelta(hours=2))  # of the machine that ingests
_MODES = {"file": "-rw-r--r--", "directory": "drwxr-xr-x", "symlink": "Lrwxrwxrwx"}


class SeedFile(msgspec.Struct, frozen=True):
    """One entry of a dataset; a symlink's size is the length of its text, whatever its object holds."""

    path: str
    size_bytes: int = 0
    mtime_s: int = _MTIME_S
    kind: Literal["file", "directory", "symlink"] = "file"
    chk: str | None = None


Files = Mapping[str, int] | Iterable[SeedFile]


def file_entries(files: Files, *, directories: bool = True) -> Iterator[Document]:
    """The entries of a ``dataFileList``, parents before what is in them; every sub-directory is one of them."""
    listed = [SeedFile(path, size) for path, size in files.items()] if isinstance(files, Mapping) else list(files)
    seen = {file.path for file in listed if file.kind == "directory"}
    for file in listed:
        if directories:
            for parent in reversed(PurePosixPath(file.path).parents[:-1]):
                if str(parent) not in seen:
                    seen.add(str(parent))
                    yield _entry(SeedFile(str(parent), _DIRECTORY_BYTES, file.mtime_s, "directory"))
        yield _entry(file)


def _entry(file: SeedFile) -> Document:
    entry = {
        "path": file.path,
        "size": file.size_bytes,
        "time": datetime.fromtimestamp(file.mtime_s, _OFFSET).isoformat(timespec="seconds"),
        "uid": "scientist",
        "gid": "e12345",
        "perm": _MODES[file.kind],
    }
    return entry if file.chk is None else {**entry, "chk": file.chk}


def dataset_body(pid: str, *, owner_group: str = "p12345", published: bool = False) -> Document:
    """What to POST to /api/v3/datasets before the origdatablocks."""
    return {
        "pid": pid,
        "type": "raw",
        "owner": "Some Body",
        "contactEmail": "somebody@facility.example",
        "principalInvestigator": "Some Body",
        "creationLocation": "/facility/instrument",
        "creationTime": datetime.fromtimestamp(_MTIME_S, UTC).isoformat(),
        "sourceFolder": f"/data/{pid}",
        "datasetName": pid.rpartition("/")[2],
        "ownerGroup": owner_group,
        "accessGroups": [],
        "isPublished": published,
    }


def origdatablock_bodies(
    pid: str,
    files: Files,
    *,
    files_per_block: int = FILES_PER_BLOCK,
    directories: bool = True,
    chk_alg: str | None = None,
) -> Iterator[Document]:
    """What to POST to /api/v3/origdatablocks (or v4), one body for each block."""
    block: list[Document] = []
    size = 0
    for entry in file_entries(files, directories=directories):
        if block and (len(block) == files_per_block or size + entry["size"] > BYTES_PER_BLOCK):
            yield _block(pid, block, size, chk_alg)
            block, size = [], 0
        block.append(entry)
        size += entry["size"]
    if block:
        yield _block(pid, block, size, chk_alg)


def _block(pid: str, entries: list[Document], size: int, chk_alg: str | None) -> Document:
    body: Document = {"datasetId": pid, "size": size, "dataFileList": entries}
    return body if chk_alg is None else {**body, "chkAlg": chk_alg}


def seed_dataset(
    state: State,
    pid: str,
    files: Files,
    *,
    files_per_block: int = FILES_PER_BLOCK,
    directories: bool = True,
    chk_alg: str | None = None,
    owner_group: str = "p12345",
    published: bool = False,
    lifecycle: Document | None = None,
) -> Document:
    """Stores a dataset whose upload is finished (archivable, datasetCreated), with its origdatablocks.

    ``lifecycle`` is put over that. Nothing of it is in the history.
    """
    body = dataset_body(pid, owner_group=owner_group, published=published)
    ready = {"archivable": True, "archiveStatusMessage": "datasetCreated", "isOnCentralDisk": False}
    body["datasetlifecycle"] = {**ready, **(lifecycle or {})}
    dataset = insert_dataset(state, body, "ingestor")
    bodies = origdatablock_bodies(pid, files, files_per_block=files_per_block, directories=directories, chk_alg=chk_alg)
    for block in bodies:
        insert_origdatablock(state, dataset, block, "ingestor")
    return dataset


def seed_job(
    state: State, kind: str, datasets: Sequence[str] | Mapping[str, Sequence[str]], *, status: str = "jobSubmitted"
) -> str:
    """Stores a job for the datasets (with wanted files, when a mapping names them) and returns its id.

    Nothing is checked and no url action runs.
    """
    wanted = datasets if isinstance(datasets, Mapping) else dict.fromkeys(datasets, ())
    dataset_list = [{"pid": pid, "files": list(paths)} for pid, paths in wanted.items()]
    body = {
        "type": kind,
        "ownerGroup": "p12345",
        "contactEmail": "somebody@facility.example",
        "statusCode": status,
        "statusMessage": status,
        "jobParams": {"username": "scientist", "datasetList": dataset_list},
    }
    job_id: str = insert_job(state, body, "scientist")["id"]
    return job_id
