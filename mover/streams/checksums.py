"""Checksums that a catalogue or an S3 server claims, computed over a stream. No I/O."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from mover.model import SourceChecksum
from mover.streams.interfaces import Buffer

__all__ = ["StreamChecksum", "composite_md5", "is_computable", "normalise_algorithm", "open_checksum"]

_ALIASES: Final = {
    "md5": "md5",
    "sha1": "sha1",
    "sha2": "sha256",
    "sha256": "sha256",
    "sha2256": "sha256",
    "blake2": "blake2b",
    "blake2b": "blake2b",
    "blake2b512": "blake2b",
    "crc64nvme": "crc64nvme",
    "md5parts": "md5-parts",
    "sha256parts": "sha256-parts",
}
_MD5_HEX: Final = re.compile(r"[0-9a-f]{32}")
_CRT: Final = "awscrt"


class StreamChecksum(Protocol):
    """A checksum under way; not safe to share between threads."""

    def update(self, data: Buffer, /) -> None:
        """Takes the next bytes, in order. Blocking."""
        ...

    def hexdigest(self) -> str:
        """The value as SourceChecksum has it; more bytes may follow."""
        ...


class _Crc64Nvme:
    def __init__(self) -> None:
        self._crc64nvme: Callable[[Any, int], int] = importlib.import_module("awscrt.checksums").crc64nvme
        self._value = 0

    def update(self, data: Buffer, /) -> None:
        self._value = self._crc64nvme(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:016x}"


class _Parts:
    """The digest of the parts' digests, and their number: S3's checksum of an object that arrived in parts."""

    def __init__(self, algorithm: str, part_size_bytes: int) -> None:
        self._algorithm, self._part_size_bytes = algorithm, part_size_bytes
        self._digests = bytearray()
        self._count = 0
        self._part = hashlib.new(algorithm, usedforsecurity=False)
        self._part_bytes = 0

    def update(self, data: Buffer, /) -> None:
        view = memoryview(data).cast("B")
        while view:
            if self._part_bytes == self._part_size_bytes:
                self._close_part()
            piece = view[: self._part_size_bytes - self._part_bytes]
            self._part.update(piece)
            self._part_bytes += len(piece)
            view = view[len(piece) :]

    def hexdigest(self) -> str:
        digests = self._digests + self._part.digest()
        return f"{hashlib.new(self._algorithm, digests, usedforsecurity=False).hexdigest()}-{self._count + 1}"

    def _close_part(self) -> None:
        self._digests += self._part.digest()
        self._count += 1
        self._part = hashlib.new(self._algorithm, usedforsecurity=False)
        self._part_bytes = 0


def normalise_algorithm(name: str) -> str | None:
    """The project's name of an algorithm as catalogues spell it (``SHA-256``, ``sha2``, ``MD5``); None: unknown."""
    return _ALIASES.get(re.sub(r"[\s_/-]", "", name.lower()))


def is_computable(algorithm: str) -> bool:
    """Whether this installation computes it; crc64nvme needs AWS's runtime library."""
    return algorithm in _ALIASES.values() and (algorithm != "crc64nvme" or importlib.util.find_spec(_CRT) is not None)


def open_checksum(claim: SourceChecksum) -> StreamChecksum | None:
    """Starts the checksum that ``claim`` asks for; None when it cannot be computed here."""
    algorithm = normalise_algorithm(claim.algorithm)
    if algorithm is None or not is_computable(algorithm):
        return None
    if algorithm == "crc64nvme":
        return _Crc64Nvme()
    if algorithm.endswith("-parts"):
        if not claim.part_size_bytes or claim.part_size_bytes < 0:
            return None
        return _Parts(algorithm.removesuffix("-parts"), claim.part_size_bytes)
    return hashlib.new(algorithm, usedforsecurity=False)


def composite_md5(etags: Sequence[str]) -> str | None:
    """The ETag that S3 makes of parts with these ETags; None when one of them is no MD5."""
    if not etags or not all(_MD5_HEX.fullmatch(etag) for etag in etags):
        return None
    joined = hashlib.md5(b"".join(map(bytes.fromhex, etags)), usedforsecurity=False).hexdigest()
    return f"{joined}-{len(etags)}"
