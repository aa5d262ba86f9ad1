"""Which members share a datablock: neighbours in path order, up to limits of payload, number and catalogue JSON.

The LTS likes few large files; the catalogue stores the list of a datablock's files as one document and takes one
request for it, which bounds members and bytes of the list.
"""

from __future__ import annotations

from typing import Final

import msgspec

__all__ = ["MAX_CATALOGUE_BYTES", "MAX_MEMBERS", "Packer", "catalogue_entry_bytes"]

MAX_MEMBERS: Final = 20_000
"""Members of one datablock. Source: SciCat's clients cut their file lists into blocks of 20,000 files."""

MAX_CATALOGUE_BYTES: Final = 10_000_000
"""Catalogue JSON of one datablock. Source: SciCat takes JSON bodies of at most 16 MiB by default, as many as a document
of its database may have; 10 MB leaves room for both."""

_ENVELOPE_BYTES = 4_096  # of the list's document: dataset and archive ids, sizes, names of groups

_LONGEST_ENTRY = {
    "path": "",
    "size": 2**64 - 1,
    "time": "10000-01-01T00:00:00.000Z",
    "chk": "0" * 128 + "-10000",  # a 512-bit digest of a multipart object, in hex
    "uid": "0" * 16,
    "gid": "0" * 16,
    "perm": "0" * 16,
}
_encode = msgspec.json.Encoder().encode
_ENTRY_BYTES = len(_encode(_LONGEST_ENTRY)) - len('""') + len(",")


def catalogue_entry_bytes(path: str) -> int:
    """Upper bound of the UTF-8 JSON of one file's entry in the catalogue; exact for the path, escapes included."""
    return len(_encode(path)) + _ENTRY_BYTES


class Packer:
    """Says where a datablock ends: ask ``fits`` about the next member, call ``start`` if it does not, ``add`` it.

    A datablock takes members while their payload stays within ``target_bytes``. A member larger than that has a
    datablock of its own, without neighbours before or after it, not even empty ones. A datablock is never empty.
    """

    def __init__(self, target_bytes: int) -> None:
        self._target_bytes = target_bytes
        self.start()

    def start(self) -> None:
        """Begins the next datablock."""
        self.members = 0
        self.payload_bytes = 0
        self.catalogue_bytes = _ENVELOPE_BYTES

    def fits(self, size_bytes: int, entry_bytes: int) -> bool:
        """Whether a member of ``size_bytes`` with ``entry_bytes`` of catalogue JSON still belongs to this datablock."""
        return self.members == 0 or (
            self.payload_bytes + size_bytes <= self._target_bytes
            and self.members < MAX_MEMBERS
            and self.catalogue_bytes + entry_bytes <= MAX_CATALOGUE_BYTES
        )

    def add(self, size_bytes: int, entry_bytes: int) -> None:
        """Counts a member in."""
        self.members += 1
        self.payload_bytes += size_bytes
        self.catalogue_bytes += entry_bytes
