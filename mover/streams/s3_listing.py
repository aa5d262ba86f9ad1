"""Pages of a listing: parsed in worker threads, exact to the byte of every key, checked for order."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from itertools import pairwise
from typing import Final
from urllib.parse import unquote_plus
from xml.etree.ElementTree import Element, ParseError, fromstring

import anyio.to_thread
import msgspec

from mover.errors import ObjectAccessError, ObjectTransientError
from mover.model import SourceObject
from mover.streams.s3_calls import S3Calls

__all__ = ["Page", "list_pages", "parse_page"]

_OP: Final = "list"


class Page(msgspec.Struct, frozen=True):
    """One page: objects in key order, the last key, and the token of the next page."""

    objects: tuple[SourceObject, ...]
    last_key: str
    token: str | None


async def list_pages(calls: S3Calls, bucket: str, prefix: str) -> AsyncIterator[tuple[SourceObject, ...]]:
    """All objects below ``prefix``, page by page; the next page is asked for when the last one is used up.

    Raises:
        ObjectAccessError: also when the pages are not in key order, or a key is outside the prefix.
    """
    location, last_key, token = f"s3://{bucket}/{prefix}", "", ""
    while True:
        page = await _fetch(calls, bucket, prefix, token)
        if page.objects:
            first_key = prefix + page.objects[0].path
            if last_key and first_key <= last_key:
                raise ObjectAccessError(_OP, location, "pages are not in order of keys")
            last_key = page.last_key
            yield page.objects
        if page.token is None:
            return
        if page.token == token:
            raise ObjectAccessError(_OP, location, "the listing does not advance")
        token = page.token


async def _fetch(calls: S3Calls, bucket: str, prefix: str, token: str) -> Page:
    location = f"s3://{bucket}/{prefix}"

    async def request() -> Page:
        if token:
            reply = await calls.client.list_objects_v2(
                Bucket=bucket, Prefix=prefix, EncodingType="url", ContinuationToken=token
            )
        else:
            reply = await calls.client.list_objects_v2(Bucket=bucket, Prefix=prefix, EncodingType="url")
        return await anyio.to_thread.run_sync(parse_page, reply["Page"], prefix, location)  # type: ignore[typeddict-item]

    return await calls.call(_OP, location, request)


def parse_page(body: bytes, prefix: str, location: str) -> Page:
    """Reads one ListObjectsV2 reply. Blocking: a few milliseconds for 1,000 keys.

    Raises:
        ObjectTransientError: the XML is cut short, garbled or no listing: never taken for an empty one.
        ObjectAccessError: a key is outside the prefix or out of order.
    """
    try:
        root = fromstring(body)  # noqa: S314 - from the storage that holds the data; expat bounds entity expansion
        space, name, _ = root.tag.rpartition("ListBucketResult")
        encoded = root.findtext(f"{space}EncodingType") == "url"
        objects = tuple(_object(item, space, prefix, encoded=encoded) for item in root.iterfind(f"{space}Contents"))
        truncated = root.findtext(f"{space}IsTruncated") == "true"
        token = root.findtext(f"{space}NextContinuationToken") if truncated else None
    except (ParseError, ValueError) as exc:
        raise ObjectTransientError(_OP, location, "the reply is cut short or garbled") from exc
    if not name or root.findtext(f"{space}IsTruncated") not in {"true", "false"} or (truncated and not token):
        raise ObjectTransientError(_OP, location, "the reply is no whole listing")
    for before, after in pairwise(objects):
        if before.path >= after.path:
            raise ObjectAccessError(_OP, location, "keys are not in order")
    return Page(objects, prefix + objects[-1].path if objects else "", token)


def _object(item: Element, space: str, prefix: str, *, encoded: bool) -> SourceObject:
    """Raises ValueError when a field is missing or strange."""
    fields = {child.tag[len(space) :]: child.text or "" for child in item}
    key = fields.get("Key", "")
    if encoded and ("%" in key or "+" in key):
        key = unquote_plus(key, errors="strict")
    if not key or not key.startswith(prefix):
        raise ValueError(key)
    mtime_s = int(datetime.fromisoformat(fields.get("LastModified", "")).timestamp())
    return SourceObject(key[len(prefix) :], int(fields.get("Size", "")), fields.get("ETag", "").strip('"'), mtime_s)
