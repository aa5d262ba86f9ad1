"""Checks of the S3 storage. They write below a hidden prefix of the staging and retrieval buckets, and clean up."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import httpx

from mover.doctor import Check, Finding, fail, fine, skip, warn
from mover.errors import MoverError, ObjectMissingError
from mover.parts import Buckets
from mover.streams.checksums import composite_md5
from mover.streams.s3 import S3Store
from mover.streams.s3_calls import S3Endpoint
from mover.streams.s3_probe import S3Probe, S3Reply, refusal_of

__all__ = ["S3Checks"]

_AREA = "S3"
_WRONG_ETAG = "0" * 32
_PART_BYTES = 5 << 20
_MANY_KEYS = 1001
_SKEW_WARN_S, _SKEW_FAIL_S = 60.0, 900.0
_LINK_LIFETIME_S = 300
_UPLOADS_AT_A_TIME = 16
_PINNED_ANYWAY = "the mover compares ETag, length and Content-Range of every reply itself"


class S3Checks:
    """The checks of one S3 storage; objects are named ``.mover-doctor/<random>/...``."""

    def __init__(self, store: S3Store, probe: S3Probe, buckets: Buckets, *, full: bool) -> None:
        self._store, self._probe, self._buckets, self._full = store, probe, buckets, full
        self._prefix = f".mover-doctor/{secrets.token_hex(8)}/"
        self._body = secrets.token_bytes(100_000)
        self._key = f"{self._prefix}object"
        self._etag = ""

    @classmethod
    @asynccontextmanager
    async def open(cls, endpoint: S3Endpoint, buckets: Buckets, *, full: bool) -> AsyncIterator[S3Checks]:
        """The checks with their connections; what they leave behind is deleted at the end."""
        async with S3Store.open(endpoint) as store, S3Probe.open(endpoint) as probe:
            checks = cls(store, probe, buckets, full=full)
            try:
                yield checks
            finally:
                with anyio.CancelScope(shield=True), anyio.move_on_after(30):
                    await checks.clean_up()

    def checks(self) -> list[Check]:
        """All checks, in an order in which later ones use what earlier ones left."""
        buckets = self._buckets
        listed: list[tuple[str, Callable[[], Awaitable[Finding]], str]] = [
            (f"landing zone {buckets.landing_zone}", self._landing_zone, "check endpoint, credentials and bucket name"),
            (f"staging bucket {buckets.staging}", lambda: self._writable(buckets.staging), "allow put, get, delete"),
            (
                f"retrieval bucket {buckets.retrieval}",
                lambda: self._writable(buckets.retrieval),
                "allow put, get, delete",
            ),
            ("clock", self._clock, "synchronise the clocks (NTP)"),
            ("round trip, Content-MD5", self._round_trip, "do not use this server"),
            ("wrong Content-MD5", self._wrong_md5, ""),
            ("If-Match", lambda: self._if_match(None), ""),
            ("If-Match on a range", lambda: self._if_match((10, 20)), ""),
            ("range", self._range, "without ranged GETs large files cannot be read in windows"),
            ("listing in pages", self._pages, "datasets of more than 1,000 files are not seen whole"),
            ("multipart upload", self._multipart, "without it datablocks cannot be retrieved"),
            ("multipart abort", self._abort, "set a lifecycle rule that ends unfinished uploads"),
            ("presigned link", self._presigned, "check MINIO_EXTERNAL_ENDPOINT"),
            ("batch delete", self._batch_delete, "allow delete in the staging bucket"),
        ]
        checks = [Check(_AREA, name, call, advice) for name, call, advice in listed]
        if self._full:
            checks.append(Check(_AREA, "listing over 1,000 keys", self._many_keys, "", deadline_s=300.0))
        return checks

    async def clean_up(self) -> None:
        """Deletes everything below the prefix of this run."""
        for bucket in dict.fromkeys((self._buckets.staging, self._buckets.retrieval)):
            try:
                keys = [self._prefix + item.path async for item in self._store.list_objects(bucket, self._prefix)]
                if keys:
                    await self._store.delete(bucket, keys)
            except MoverError:
                continue  # the checks have told what is wrong with the bucket

    async def _landing_zone(self) -> Finding:
        keys, _ = await self._probe.list_page(self._buckets.landing_zone, "", 1)
        return fine("readable" if keys else "readable, and empty")

    async def _writable(self, bucket: str) -> Finding:
        key = f"{self._prefix}written"
        await self._probe.put(bucket, key, b"mover doctor")
        reply = await self._probe.get(bucket, key)
        if reply.body != b"mover doctor":
            return fail("an object comes back with other bytes", "do not use this server")
        await self._store.delete(bucket, [key])
        try:
            await self._probe.get(bucket, key)
        except ObjectMissingError:
            return fine("put, get and delete work")
        return fail("a deleted object is still there", "look for versioning or object lock on the bucket")

    async def _clock(self) -> Finding:
        skew_s = await self._probe.clock_skew_s(self._buckets.staging)
        if skew_s is None:
            return warn("the server sends no Date", "signatures fail when clocks differ by more than 15 minutes")
        text = f"the server's clock is {abs(skew_s):.0f} s {'ahead' if skew_s > 0 else 'behind'}"
        advice = "synchronise the clocks (NTP); signatures fail beyond 15 minutes"
        if abs(skew_s) > _SKEW_FAIL_S:
            return fail(text, advice)
        return warn(text, advice) if abs(skew_s) > _SKEW_WARN_S else fine(text)

    async def _round_trip(self) -> Finding:
        bucket = self._buckets.staging
        self._etag = await self._probe.put(bucket, self._key, self._body)
        reply = await self._probe.get(bucket, self._key)
        if reply.body != self._body:
            framed = b"chunk-signature" in reply.body or b"x-amz-checksum" in reply.body
            text = "chunk framing was stored in the object" if framed else f"{len(reply.body):,} other bytes came back"
            return fail(text, "the server mishandles uploads: do not use it")
        md5 = hashlib.md5(self._body, usedforsecurity=False).hexdigest()
        if reply.etag != self._etag:
            return fail(f"put says ETag {self._etag}, get says {reply.etag}", "objects cannot be pinned on this server")
        if self._etag != md5:
            return warn("byte-identical; the ETag is not the MD5", "ETags do not count as checksums here (encryption?)")
        return fine(f"{len(self._body):,} bytes come back identical, the ETag is their MD5")

    async def _wrong_md5(self) -> Finding:
        try:
            await self._probe.put(self._buckets.staging, f"{self._prefix}wrong", self._body, md5_of=b"other bytes")
        except MoverError as error:
            status, code = refusal_of(error)
            return fine(f"refused ({status} {code})") if 400 <= status < 500 else fail(str(error), "")
        return warn(
            "accepted", "the server ignores Content-MD5; the mover compares the ETags of what it uploads itself"
        )

    async def _if_match(self, ranged: tuple[int, int] | None) -> Finding:
        if not self._etag:
            return skip("the object of the round trip is missing")
        bucket = self._buckets.staging
        await self._probe.get(bucket, self._key, if_match=self._etag, ranged=ranged)
        try:
            await self._probe.get(bucket, self._key, if_match=_WRONG_ETAG, ranged=ranged)
        except MoverError as error:
            status, code = refusal_of(error)
            return fine("a wrong ETag gives 412") if status == 412 else fail(f"a wrong ETag gives {status} {code}", "")
        return warn("a wrong ETag is ignored", f"{_PINNED_ANYWAY}, so a changed object is still noticed")

    async def _range(self) -> Finding:
        if not self._etag:
            return skip("the object of the round trip is missing")
        reply: S3Reply = await self._probe.get(self._buckets.staging, self._key, ranged=(1000, 51_000))
        found = f"{reply.status}, Content-Range {reply.headers.get('content-range')!r}, {len(reply.body):,} bytes"
        expected = f"bytes 1000-50999/{len(self._body)}"
        exact = reply.status == 206 and reply.headers.get("content-range") == expected
        if exact and reply.body == self._body[1000:51_000]:
            return fine(found)
        return fail(found, "ranged GETs are wrong: large files cannot be read from this server")

    async def _pages(self) -> Finding:
        names = ["page/a b", "page/a+b", "page/c%20d", "page/é", "page/z"]
        bucket, prefix = self._buckets.staging, f"{self._prefix}page/"
        for name in names:
            await self._probe.put(bucket, self._prefix + name, b"")
        seen, token, pages = [], "", 0
        while pages <= len(names):
            keys, token = await self._probe.list_page(bucket, prefix, 2, token)
            seen += [f"page/{key}" for key in keys]
            pages += 1
            if not token:
                break
        if seen != sorted(names, key=str.encode):
            return fail(f"{len(names)} keys were written, listed are {seen!r}", "listings cannot be relied on")
        return fine(f"{len(names)} keys in {pages} pages, names intact")

    async def _many_keys(self) -> Finding:
        bucket, prefix = self._buckets.staging, f"{self._prefix}many/"
        numbers = iter(range(_MANY_KEYS))

        async def write() -> None:
            for number in numbers:
                await self._probe.put(bucket, f"{prefix}{number:04}", b"")

        async with anyio.create_task_group() as tasks:
            for _ in range(_UPLOADS_AT_A_TIME):
                tasks.start_soon(write)
        found = len([item async for item in self._store.list_objects(bucket, prefix)])
        if found != _MANY_KEYS:
            return fail(f"{_MANY_KEYS:,} keys were written, {found:,} are listed", "listings cannot be relied on")
        return fine(f"{found:,} keys listed")

    async def _multipart(self) -> Finding:
        bucket, key = self._buckets.staging, f"{self._prefix}multipart"
        parts = [self._body * (_PART_BYTES // len(self._body) + 1), self._body]
        upload = await self._store.begin(bucket, key, {})
        try:
            etags = [await self._store.put_part(upload, number, part) for number, part in enumerate(parts, start=1)]
            etag = await self._store.complete(upload, etags)
        except MoverError:
            await self._store.abort(upload)
            raise
        reply = await self._probe.get(bucket, key)
        if reply.body != b"".join(parts):
            return fail(f"{len(reply.body):,} other bytes came back", "do not retrieve to this server")
        if etag != composite_md5(etags):
            return warn(
                f"two parts; the ETag {etag} is not made of theirs", "the end of an upload cannot be proved here"
            )
        return fine(f"two parts, {len(reply.body):,} bytes identical, composite ETag")

    async def _abort(self) -> Finding:
        bucket, key = self._buckets.staging, f"{self._prefix}aborted"
        upload = await self._store.begin(bucket, key, {})
        await self._store.put_part(upload, 1, self._body)
        await self._store.abort(upload)
        try:
            left = await self._probe.uploads(bucket, key)
        except MoverError as error:
            return warn(
                f"aborted; uploads cannot be listed: {error}", "set a lifecycle rule that ends unfinished uploads"
            )
        if left:
            return fail("the upload is still listed", "set a lifecycle rule that ends unfinished uploads")
        return fine("nothing is left")

    async def _presigned(self) -> Finding:
        bucket, key = self._buckets.retrieval, f"{self._prefix}linked"
        await self._probe.put(bucket, key, self._body)
        url = await self._store.presign(bucket, key, _LINK_LIFETIME_S)
        host = f"{httpx.URL(url).scheme}://{httpx.URL(url).netloc.decode()}"
        async with httpx.AsyncClient(timeout=10.0) as client:
            try:
                good = await client.get(url)
                forged = await client.get(url[:-1] + ("0" if url[-1] != "0" else "1"))
            except httpx.HTTPError as error:
                return fail(f"{host}: {type(error).__name__}", "MINIO_EXTERNAL_ENDPOINT cannot be reached from here")
        if good.status_code != 200 or good.content != self._body:
            return fail(
                f"{host} answers {good.status_code} to a link", "check MINIO_EXTERNAL_ENDPOINT and MINIO_REGION"
            )
        if forged.status_code == 200:
            advice = "the server checks no signatures, or everybody may read the bucket: links protect nothing"
            return warn(f"{host} serves the link, and a forged one, too", advice)
        return fine(f"{host} serves the link and refuses a forged one ({forged.status_code})")

    async def _batch_delete(self) -> Finding:
        bucket = self._buckets.staging
        keys = [f"{self._prefix}deleted {number}+&" for number in range(3)]
        for key in keys:
            await self._probe.put(bucket, key, b"")
        try:
            await self._probe.delete_batch(bucket, keys)
        except MoverError as error:
            status, code = refusal_of(error)
            result = await self._store.delete(bucket, keys)
            if result.failed:
                return fail(f"refused ({status} {code}), and so are single deletes", "allow delete in the bucket")
            return warn(f"refused ({status} {code}); single deletes work", "releasing large datasets takes longer")
        left, _ = await self._probe.list_page(bucket, f"{self._prefix}deleted", 10)
        return fail(f"{len(left)} of 3 keys are still there", "releases cannot be relied on") if left else fine("works")
