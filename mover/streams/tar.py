"""The byte layout of a datablock: a POSIX pax archive whose every byte follows from paths, sizes and times.

A member is an optional pax extended header (only for what a ustar header cannot hold), a ustar header, the payload and
zeros up to the next 512-byte block; two zero blocks and zeros up to the next 10,240-byte record end the file. Modes,
owners and names of owners are fixed, so that the same plan gives the same bytes on every host and Python version.
The blocks are built here and not by a library: the layout must not change with a release of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from mover.errors import LayoutMismatchError
from mover.model import Datablock, Manifest, datablock_name

__all__ = [
    "BLOCK_BYTES",
    "RECORD_BYTES",
    "TarPiece",
    "datablock_size_bytes",
    "end_bytes",
    "extract_archive",
    "header_bytes",
    "header_size_bytes",
    "padding_bytes",
    "structure",
]

BLOCK_BYTES: Final = 512
RECORD_BYTES: Final = 20 * BLOCK_BYTES

_NAME_BYTES = 100
_OCTAL_LIMIT = 8**11  # sizes from 8 GiB on and times from 2242 on (or before 1970) need a pax record

_OWNER = b"0000644\x000000000\x000000000\x00"  # mode, uid, gid
_PAX_OWNER = b"0000000\x000000000\x000000000\x00"
_MAGIC = (b"\0" * 100) + b"ustar\x0000" + b"\0" * 247  # link name, magic, owner's names, device, prefix, filler
_CHECKSUM_BASE = 8 * 0x20 + sum(_MAGIC)  # the checksum counts its own field as blanks
_PAX_NAME = b"././@PaxHeader"

_AS_IT_IS = b"21 hdrcharset=BINARY\n"  # pax: the values that follow are bytes, not to be converted

# Characters that join the one before them where a reader composes Unicode, as libarchive does for names in UTF-8: a
# name with one would come back as another name. A fixed list: the layout must not follow the interpreter's Unicode.
_COMPOSING = re.compile(
    "[\u0300-\u036f\u05b4\u05b7-\u05b9\u05bc\u05bf\u05c1\u05c2\u0653-\u0655\u093c\u09bc\u09be\u09d7\u0a3c\u0b3c\u0b3e\u0b56\u0b57"
    "\u0bbe\u0bd7\u0c56\u0cc2\u0cd5\u0cd6\u0d3e\u0d57\u0dca\u0dcf\u0ddf\u0f72\u0f74\u0f80\u0fb5\u0fb7\u102e\u1161-\u1175\u11a8-\u11c2"
    "\u1b35\u3099\u309a\U000110ba\U00011127\U0001133e\U00011357\U000114b0\U000114ba\U000114bd\U000115af\U00011930"
    "\U0001d165\U0001d16e-\U0001d172]"
)


class TarPiece(msgspec.Struct, frozen=True, gc=False):
    """Bytes of a datablock that are no payload, and where they are."""

    offset_bytes: int
    content: bytes

    @property
    def end_bytes(self) -> int:
        """Where the payload that follows begins; for the last piece, the size of the file."""
        return self.offset_bytes + len(self.content)


def padding_bytes(size_bytes: int) -> int:
    """Zeros between the end of a payload and the next block."""
    return -size_bytes % BLOCK_BYTES


def end_bytes(content_end_bytes: int) -> int:
    """Zeros from the end of the last member to the end of the file."""
    return 2 * BLOCK_BYTES + -(content_end_bytes + 2 * BLOCK_BYTES) % RECORD_BYTES


def datablock_size_bytes(content_end_bytes: int) -> int:
    """Exact size of a tar file whose last member ends at ``content_end_bytes``."""
    return content_end_bytes + end_bytes(content_end_bytes)


def header_size_bytes(path: str, size_bytes: int, mtime_s: int) -> int:
    """Exact length of ``header_bytes`` for the same arguments, without building it."""
    if len(path) <= _NAME_BYTES and path.isascii() and 0 <= mtime_s < _OCTAL_LIMIT and size_bytes < _OCTAL_LIMIT:
        return BLOCK_BYTES
    records = 0
    if len(path) > _NAME_BYTES or not path.isascii():
        records += _record_length(len("path"), len(path.encode()))
        if _COMPOSING.search(path):
            records += len(_AS_IT_IS)
    if size_bytes >= _OCTAL_LIMIT:
        records += _record_length(len("size"), len(str(size_bytes)))
    if not 0 <= mtime_s < _OCTAL_LIMIT:
        records += _record_length(len("mtime"), len(str(mtime_s)))
    return 2 * BLOCK_BYTES + records + padding_bytes(records)


def header_bytes(path: str, size_bytes: int, mtime_s: int) -> bytes:
    """Everything that precedes the payload of one member: the pax extended header where needed, and the ustar header.

    A time outside the range of ustar (1970 to 2242) is kept in a pax record, not clamped.
    """
    records = b""
    if len(path) > _NAME_BYTES or not path.isascii():
        if _COMPOSING.search(path):
            records += _AS_IT_IS
        records += _record(b"path", path.encode())
    if size_bytes >= _OCTAL_LIMIT:
        records += _record(b"size", b"%d" % size_bytes)
        size_bytes = 0  # the record overrides it
    if not 0 <= mtime_s < _OCTAL_LIMIT:
        records += _record(b"mtime", b"%d" % mtime_s)
        mtime_s = 0
    header = _block(path.encode("ascii", "replace")[:_NAME_BYTES], _OWNER, size_bytes, mtime_s, b"0")
    if not records:
        return header
    extended = _block(_PAX_NAME, _PAX_OWNER, len(records), 0, b"x")
    return b"".join((extended, records, bytes(padding_bytes(len(records))), header))


def structure(datablock: Datablock | Manifest) -> Iterator[TarPiece]:
    """All bytes of a datablock that are no payload, in order: one piece before each member's payload, one at the end.

    Piece ``i`` is the padding of member ``i - 1`` and the header of member ``i``: it ends where the payload of member
    ``i`` begins. The last of the ``len(members) + 1`` pieces is the last padding and the end of the archive.

    Raises:
        LayoutMismatchError: the offsets or the size in ``datablock`` are not those of this layout.
    """
    where = datablock_name(datablock.dataset_id, datablock.number)
    end = padding = 0  # of the member before
    for member in datablock.members:
        header = header_bytes(member.path, member.size_bytes, member.mtime_s)
        if member.offset_bytes != end + padding:
            raise LayoutMismatchError(where, f"offset of {member.path!r}", end + padding, member.offset_bytes)
        if member.header_bytes != len(header):
            raise LayoutMismatchError(where, f"header of {member.path!r}", len(header), member.header_bytes)
        yield TarPiece(end, bytes(padding) + header if padding else header)
        end += padding + len(header) + member.size_bytes
        padding = padding_bytes(member.size_bytes)
    size_bytes = datablock_size_bytes(end + padding)
    if datablock.size_bytes != size_bytes:
        raise LayoutMismatchError(where, "size", size_bytes, datablock.size_bytes)
    yield TarPiece(end, bytes(size_bytes - end))


def extract_archive(path: Path, folder: Path) -> None:
    """Unpacks a datablock below ``folder`` with Python's own reader, for demonstrations. Blocking.

    Raises:
        LayoutMismatchError: it is no archive, or holds something that would leave the folder.
    """
    import tarfile

    try:
        with tarfile.open(path, "r:") as archive:
            if hasattr(tarfile, "data_filter"):
                archive.extractall(folder, filter="data")
            else:  # Python before 3.11.4; what leaves the folder was refused when the archive was planned
                archive.extractall(folder)  # noqa: S202
    except tarfile.TarError as exc:
        raise LayoutMismatchError(str(path), "archive", "readable", str(exc)) from exc


def _block(name: bytes, owner: bytes, size_bytes: int, mtime_s: int, kind: bytes) -> bytes:
    numbers = b"%011o\0%011o\0" % (size_bytes, mtime_s)
    checksum = _CHECKSUM_BASE + sum(name) + sum(owner) + sum(numbers) + kind[0]
    return b"%b%b%b%06o\0 %b%b" % (name.ljust(_NAME_BYTES, b"\0"), owner, numbers, checksum, kind, _MAGIC)


def _record(keyword: bytes, value: bytes) -> bytes:
    return b"%d %b=%b\n" % (_record_length(len(keyword), len(value)), keyword, value)


def _record_length(keyword_bytes: int, value_bytes: int) -> int:
    """A record begins with its own length in decimal, digits included."""
    content = keyword_bytes + value_bytes + 3  # blank, equals sign, newline
    length = content + len(str(content))
    return content + len(str(length))
