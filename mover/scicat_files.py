"""The list of a dataset's files, from SciCat's origdatablocks: a page at a time, and never less than all of it.

An account without the right to see origdatablocks gets an empty list with status 200, and lists without limits are cut
off silently. So the number of origdatablocks is compared with the server's own count, and an empty list with what the
dataset says of itself.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from math import floor
from typing import Any, Final, Literal

import anyio.lowlevel
import msgspec

from mover.errors import CatalogueAccessError, CatalogueTransientError, DatasetNotFoundError
from mover.model import CatalogueFile, SourceChecksum
from mover.scicat_http import SciCatSession, segment
from mover.scicat_reply import Call, Reply
from mover.streams.checksums import normalise_algorithm

__all__ = ["OrigDatablocks", "read_dataset"]

_LIST = "list files of"
_PAGE_BLOCKS = 5  # an origdatablock of 20,000 files is 5 MB of JSON, and may be 16
_LARGE_PAGE_BYTES = 8 << 20  # after such a page, the next ones are single blocks
_YIELD_EVERY = 1_000  # entries between two checkpoints: a few milliseconds
_DIGEST_CHARACTERS: Final = {"md5": 32, "sha1": 40, "sha256": 64, "blake2b": 128}
_HEX: Final = re.compile(r"[0-9a-f]+")


class _Entry(msgspec.Struct, gc=False, rename={"size_bytes": "size"}):
    path: str
    size_bytes: int | float
    time: str | None = None
    chk: str | None = None
    perm: str | None = None


class _Block(msgspec.Struct, rename={"block_id": "_id", "other_id": "id"}):
    block_id: str = ""
    other_id: str = ""
    chkAlg: str | None = None  # noqa: N815 - SciCat's name
    dataFileList: list[msgspec.Raw] | None = None  # noqa: N815 - as above

    @property
    def key(self) -> str:
        return self.block_id or self.other_id


_read_entry = msgspec.json.Decoder(_Entry, strict=True).decode
_read_blocks = msgspec.json.Decoder(list[_Block]).decode


async def read_dataset(send: Callable[[Call], Awaitable[Reply]], dataset_id: str, op: str) -> dict[str, Any]:
    """The dataset's own record, by the session's ``call`` or ``call_once``.

    Raises:
        DatasetNotFoundError: there is none.
    """
    reply = await send(Call(op, dataset_id, "GET", f"datasets/{segment(dataset_id)}"))
    if reply.missing:
        raise DatasetNotFoundError(dataset_id, "the catalogue")
    return reply.record()


class OrigDatablocks:
    """The origdatablocks of one dataset, read once."""

    def __init__(self, session: SciCatSession, dataset_id: str) -> None:
        self._session, self._dataset_id = session, dataset_id
        self._blocks = 0
        self._claimed = False

    async def prepare(self) -> None:
        """Finds out how many there are.  Raises DatasetNotFoundError."""
        await self._session.identity()
        dataset = await read_dataset(self._session.call, self._dataset_id, "read")
        self._claimed = any(_positive(dataset.get(name)) for name in ("numberOfFiles", "size"))
        self._blocks = await self._count()

    async def files(self) -> AsyncIterator[CatalogueFile]:
        """All entries, in the order of the catalogue.

        Raises:
            CatalogueTransientError: origdatablocks came or went meanwhile.
            CatalogueAccessError: not all of them can be seen, or one cannot be read.
        """
        seen: set[str] = set()
        entries, limit = 0, _PAGE_BLOCKS
        while True:
            reply = await self._page(len(seen), limit)
            blocks = _decoded(reply)
            for block in blocks:
                if block.key in seen:
                    raise self._changed()
                seen.add(block.key)
                for number, raw in enumerate(block.dataFileList or (), 1):
                    yield _file(reply, block, raw)
                    entries += 1
                    if number % _YIELD_EVERY == 0:
                        await anyio.lowlevel.checkpoint()
            if len(blocks) < limit:
                break
            limit = 1 if len(reply.body) > _LARGE_PAGE_BYTES else _PAGE_BLOCKS
        await self._check_whole(len(seen), entries)

    async def _page(self, skip: int, limit: int) -> Reply:
        limits = {"limit": limit, "skip": skip, "order": "_id:asc"}
        query = msgspec.json.encode({"where": {"datasetId": self._dataset_id}, "limits": limits}).decode()
        call = Call(_LIST, self._dataset_id, "GET", "origdatablocks", query={"filter": query})
        return (await self._session.call(call)).check()

    async def _count(self) -> int:
        path = f"datasets/{segment(self._dataset_id)}/origdatablocks/count"
        reply = await self._session.call(Call("count origdatablocks of", self._dataset_id, "GET", path))
        if reply.missing:
            raise DatasetNotFoundError(self._dataset_id, "the catalogue")
        count = reply.record().get("count")
        if not isinstance(count, int):
            raise reply.unreadable()
        return count

    async def _check_whole(self, blocks: int, entries: int) -> None:
        if blocks != self._blocks and await self._count() != self._blocks:
            raise self._changed()
        if blocks != self._blocks or (not entries and self._claimed):
            reason = (
                f"{blocks} of {self._blocks} origdatablocks with {entries:,} files are visible, which is not all that"
                " the dataset has; are the account's groups right?"
            )
            raise CatalogueAccessError(_LIST, self._dataset_id, reason)

    def _changed(self) -> CatalogueTransientError:
        return CatalogueTransientError(_LIST, self._dataset_id, "the list changed while it was read")


def _decoded(reply: Reply) -> list[_Block]:
    try:
        return _read_blocks(reply.body)
    except msgspec.MsgspecError as error:
        raise reply.unreadable() from error


def _file(reply: Reply, block: _Block, raw: msgspec.Raw) -> CatalogueFile:
    try:
        entry = _read_entry(raw)
    except msgspec.MsgspecError as error:
        raise _unreadable_entry(reply, block, str(error)) from error
    if not 0 <= entry.size_bytes < 2**63 or entry.size_bytes != int(entry.size_bytes):
        raise _unreadable_entry(reply, block, f"size {entry.size_bytes!r} of {entry.path!r}")
    kind = _kind(entry.perm)
    checksum = _checksum(block.chkAlg, entry.chk) if kind == "file" else None
    return CatalogueFile(entry.path, int(entry.size_bytes), _mtime_s(entry.time), kind, checksum)


def _unreadable_entry(reply: Reply, block: _Block, detail: str) -> CatalogueAccessError:
    reason = f"an entry of origdatablock {block.key!r} cannot be read: {detail}"
    return CatalogueAccessError(reply.call.op, reply.call.target, reason)


def _kind(permissions: str | None) -> Literal["file", "directory", "symlink"]:
    """From texts as ``drwxr-xr-x``; Go writes ``L`` for links. Anything else says nothing."""
    first = (permissions or "")[:1]
    return "directory" if first == "d" else "symlink" if first in {"l", "L"} else "file"


def _mtime_s(text: str | None) -> int | None:
    """Whole seconds; a time without zone is taken as UTC, None when it is no time."""
    try:
        moment = datetime.fromisoformat(text or "")
        return floor((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError):
        return None


def _checksum(algorithm: str | None, value: str | None) -> SourceChecksum | None:
    """The claim, if it is one that can be verified: checksums are optional, and many clients write none."""
    name = normalise_algorithm(algorithm) if algorithm and value else None
    digest = (value or "").strip().lower()
    if name is None or len(digest) != _DIGEST_CHARACTERS.get(name) or not _HEX.fullmatch(digest):
        return None
    return SourceChecksum(name, digest, "catalogue")


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and value > 0
