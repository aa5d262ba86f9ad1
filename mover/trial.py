"""A dataset for trying a deployment: made from its own name, so that what comes back needs no original to compare."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread
import httpx
import msgspec

from mover.errors import ObjectAccessError
from mover.model import CatalogueFile, raw_object_key
from mover.streams.interfaces import ObjectStore
from mover.streams.tar import extract_archive
from mover.tasks import open_task_group

__all__ = ["TrialDataset", "compare_links", "upload"]

_UPLOADS_AT_A_TIME: Final = 8
_TIMEOUT_S: Final = 60.0
_PIECE_BYTES: Final = 1 << 20


class TrialDataset(msgspec.Struct, frozen=True):
    """``file_count`` files of about ``file_bytes`` each; their contents follow from the dataset's id."""

    dataset_id: str
    file_count: int
    file_bytes: int

    def files(self) -> list[CatalogueFile]:
        """Paths and sizes; sizes vary by some bytes, the first file is empty."""
        sizes = [0 if index == 0 else self.file_bytes + index % 512 for index in range(self.file_count)]
        return [CatalogueFile(f"frames/frame {index:06}.tif", size) for index, size in enumerate(sizes)]

    def content(self, file: CatalogueFile) -> bytes:
        """The bytes of one file."""
        seed = hashlib.sha256(f"{self.dataset_id}\0{file.path}".encode()).digest()
        return random.Random(seed).randbytes(file.size_bytes)


async def upload(store: ObjectStore, bucket: str, dataset: TrialDataset) -> None:
    """Puts the files into the landing zone, a few at a time.  Raises MoverError."""
    pending = iter(dataset.files())

    async def work() -> None:
        for file in pending:  # shared: each task takes the next one
            body = await anyio.to_thread.run_sync(dataset.content, file)
            await store.put(bucket, raw_object_key(dataset.dataset_id, file.path), body, {})

    async with open_task_group() as tasks:
        for _ in range(_UPLOADS_AT_A_TIME):
            tasks.start_soon(work)


async def compare_links(links: Sequence[tuple[str, str]], dataset: TrialDataset, scratch_folder: Path) -> list[str]:
    """Downloads datablocks by their (name, link), unpacks them and compares; what differs, in words.

    Raises:
        ObjectAccessError: a link does not work.
        LayoutMismatchError: a datablock cannot be unpacked.
    """
    await anyio.Path(scratch_folder).mkdir(parents=True, exist_ok=True)
    async with anyio.TemporaryDirectory(dir=str(scratch_folder), prefix="trial-") as name:
        folder = Path(name)
        unpacked = folder / "files"
        await anyio.Path(unpacked).mkdir()
        async with httpx.AsyncClient(timeout=_TIMEOUT_S) as client:
            for datablock, link in links:
                path = folder / Path(datablock).name
                await _download(client, datablock, link, path)
                await anyio.to_thread.run_sync(extract_archive, path, unpacked)
                await anyio.Path(path).unlink()
        return await anyio.to_thread.run_sync(lambda: list(_differences(dataset, unpacked)))


async def _download(client: httpx.AsyncClient, name: str, link: str, path: Path) -> None:
    try:
        async with client.stream("GET", link) as response:
            if response.status_code != httpx.codes.OK:
                raise ObjectAccessError("download", name, str(response.status_code))
            async with await anyio.open_file(path, "wb") as file:
                async for piece in response.aiter_bytes(_PIECE_BYTES):
                    await file.write(piece)
    except httpx.HTTPError as error:
        raise ObjectAccessError("download", name, type(error).__name__) from None  # its text has the link


def _differences(dataset: TrialDataset, unpacked: Path) -> Iterator[str]:
    expected = {file.path for file in dataset.files()}
    for file in dataset.files():
        found = unpacked / file.path
        if not found.is_file():
            yield f"missing: {file.path!r}"
        elif found.read_bytes() != dataset.content(file):
            yield f"other bytes: {file.path!r}"
    for path in unpacked.rglob("*"):
        name = path.relative_to(unpacked).as_posix()
        if not path.is_dir() and name not in expected:
            yield f"too much: {name!r}"
