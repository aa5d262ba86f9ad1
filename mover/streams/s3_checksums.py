"""What an S3 server claims about the bytes of an object, in a form that a stream can be compared with."""

from __future__ import annotations

import binascii
import re
from base64 import b64decode
from typing import TYPE_CHECKING, Final

from mover.errors import ObjectAccessError, ObjectChangedError
from mover.model import SourceChecksum
from mover.streams.checksums import is_computable
from mover.streams.s3_calls import S3Calls

if TYPE_CHECKING:
    from types_aiobotocore_s3.type_defs import HeadObjectOutputTypeDef

__all__ = ["source_checksum"]

_MD5: Final = re.compile(r"[0-9a-f]{32}")
_COMPOSITE: Final = re.compile(r"[0-9a-f]{32}-(\d{1,5})")
_OP: Final = "checksum"


async def source_checksum(calls: S3Calls, bucket: str, key: str, etag: str, size_bytes: int) -> SourceChecksum | None:
    """See ObjectStore: without a request for a single-part object, with one or two HEADs for others.

    Raises:
        ObjectChangedError: the object has another ETag or size now.
    """
    if _MD5.fullmatch(etag):
        return SourceChecksum("md5", etag, "s3-etag")
    composite = _COMPOSITE.fullmatch(etag)
    if composite is None:
        return None
    location = f"s3://{bucket}/{key}"
    head = await calls.call(
        _OP, location, lambda: calls.client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    )
    found = head["ETag"].strip('"')
    if found != etag:
        raise ObjectChangedError(_OP, location, "ETag", etag, found)
    if head["ContentLength"] != size_bytes:
        raise ObjectChangedError(_OP, location, "size", size_bytes, head["ContentLength"])
    whole = _whole_object(head)
    if whole is not None:
        return whole
    parts = int(composite[1])
    part_size_bytes = await _part_size_bytes(calls, bucket, key, size_bytes, parts)
    if part_size_bytes is None:
        return None
    sha256 = _sha256_parts(head, parts)
    if sha256 is not None:
        return SourceChecksum("sha256-parts", sha256, "s3-checksum", part_size_bytes)
    return SourceChecksum("md5-parts", etag, "s3-etag", part_size_bytes)


def _whole_object(head: HeadObjectOutputTypeDef) -> SourceChecksum | None:
    """A checksum over the whole object that can be computed here."""
    sha256 = _hex(head.get("ChecksumSHA256", ""), 32)
    if sha256 and head.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT":
        return SourceChecksum("sha256", sha256, "s3-checksum")
    crc64nvme = _hex(head.get("ChecksumCRC64NVME", ""), 8)
    if crc64nvme and is_computable("crc64nvme"):
        return SourceChecksum("crc64nvme", crc64nvme, "s3-checksum")
    return None


def _sha256_parts(head: HeadObjectOutputTypeDef, parts: int) -> str | None:
    """The composite SHA-256 with its number of parts, which some servers leave out."""
    value, _, count = head.get("ChecksumSHA256", "").partition("-")
    digest = _hex(value, 32)
    return f"{digest}-{parts}" if digest and count in {"", str(parts)} else None


async def _part_size_bytes(calls: S3Calls, bucket: str, key: str, size_bytes: int, parts: int) -> int | None:
    """The size of the first part, when all parts but the last can have it; None when the server does not tell."""
    if parts == 1:
        return size_bytes or None

    async def request() -> int:
        reply = await calls.client.head_object(Bucket=bucket, Key=key, PartNumber=1)
        return reply["ContentLength"]

    try:
        first_bytes = await calls.call(_OP, f"s3://{bucket}/{key}", request)
    except ObjectAccessError:  # it does not know part numbers, so no composite can be compared
        return None
    return first_bytes if first_bytes and -(-size_bytes // first_bytes) == parts else None


def _hex(value: str, size_bytes: int) -> str | None:
    try:
        digest = b64decode(value, validate=True)
    except binascii.Error:
        return None
    return digest.hex() if len(digest) == size_bytes else None
