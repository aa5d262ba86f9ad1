"""The S3 store against real servers: exact names, honest checksums, uploads and deletes that survive faults."""

from __future__ import annotations

import hashlib
import math
import os
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio.to_thread
import pytest

from mover.errors import (
    DigestMismatchError,
    ObjectAccessError,
    ObjectChangedError,
    ObjectMissingError,
    ObjectThrottledError,
    StallError,
    UploadMissingError,
)
from mover.policies.retry import RetryPolicy
from mover.streams.checksums import open_checksum
from mover.streams.s3 import S3Endpoint, S3Store
from tests.faults import (
    AlterReply,
    Answer,
    CorruptRequest,
    CutReply,
    CutRequest,
    FaultProxy,
    LoseReply,
    Rule,
    StallReply,
    StallRequest,
)
from tests.servers import S3Server

pytestmark = pytest.mark.anyio

BUCKET = "store-tests"
PREFIX = "openem-network/datasets/20.500.11935/x/raw_files/"
PART_BYTES = 5 << 20
NAMES = [
    "plain.tif",
    "a b+c%20&=#?@:;,.tif",
    "../up",
    "a//b",
    "%2F%25",
    "\u00e9",
    "e\u0301",
    " lead and trail ",
    ".hidden",
    "<&>\"'",
    "tab\tin",
    "carriage\rreturn",
    "folder/",
    "\u65e5\u672c/\U0001f52c.mrc",
    "n" * (1024 - len(PREFIX)),
]


@pytest.fixture
def endpoint(s3_server: S3Server) -> S3Endpoint:
    return S3Endpoint(
        s3_server.endpoint_url, s3_server.region, s3_server.access_key, s3_server.secret_key, stall_timeout_s=5
    )


async def no_pause(_: float) -> None:
    """Retries follow at once."""


@asynccontextmanager
async def opened(config: S3Endpoint, attempts: int = 4) -> AsyncIterator[S3Store]:
    async with S3Store.open(config, policy=RetryPolicy(attempts=attempts), sleep=no_pause) as store:
        yield store


@pytest.fixture
async def store(endpoint: S3Endpoint) -> AsyncIterator[S3Store]:
    """A store with an empty bucket."""
    async with opened(endpoint) as store:
        await store.create_bucket_if_missing(BUCKET)
        await empty(store)
        yield store
        await empty(store)


@pytest.fixture
async def proxy(endpoint: S3Endpoint, store: S3Store) -> AsyncIterator[FaultProxy]:
    """A proxy in front of the same server; ``store`` has made the bucket."""
    assert store.statistics().requests
    async with FaultProxy(endpoint.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
async def faulty(endpoint: S3Endpoint, proxy: FaultProxy) -> AsyncIterator[S3Store]:
    """A store that talks through the proxy, with a short stall watchdog."""
    config = S3Endpoint(proxy.url, endpoint.region, endpoint.access_key, endpoint.secret_key, stall_timeout_s=0.5)
    async with opened(config) as store:
        yield store


async def empty(store: S3Store) -> None:
    await store.delete(BUCKET, [item.path async for item in store.list_objects(BUCKET, "")])


async def paths(store: S3Store, prefix: str = "") -> list[str]:
    return [item.path async for item in store.list_objects(BUCKET, prefix)]


async def upload(store: S3Store, key: str, data: bytes) -> tuple[str, list[str]]:
    begun = await store.begin(BUCKET, key, {})
    parts = [data[start : start + PART_BYTES] for start in range(0, len(data), PART_BYTES)]
    etags = [await store.put_part(begun, number, memoryview(part)) for number, part in enumerate(parts, 1)]
    return await store.complete(begun, etags), etags


# ------------------------------------------------------------------------------------------------------------ listing
async def test_every_name_comes_back_exactly_and_in_order(store: S3Store) -> None:
    for name in NAMES:
        await store.put(BUCKET, PREFIX + name, name.encode(), {})
    await store.put(BUCKET, PREFIX, b"", {})
    listed = [item async for item in store.list_objects(BUCKET, PREFIX)]
    assert [item.path for item in listed] == sorted(["", *NAMES])
    for item in listed:
        head = await store.head(BUCKET, PREFIX + item.path)
        content = item.path.encode()
        assert (item.size_bytes, item.etag) == (len(content), hashlib.md5(content, usedforsecurity=False).hexdigest())
        assert (head.path, head.size_bytes, head.etag) == (PREFIX + item.path, item.size_bytes, item.etag)
        assert head.mtime_s == item.mtime_s
    assert (await store.delete(BUCKET, [PREFIX + item.path for item in listed])).failed == ()
    assert await paths(store) == []


async def test_a_name_with_a_newline_is_listed_and_only_it_is_deleted(store: S3Store, s3_server: S3Server) -> None:
    if s3_server.name == "moto":
        pytest.skip("moto's web framework routes no newlines")
    for name in ("a\nb", "a b", "a\r\nb", "ab"):
        await store.put(BUCKET, name, b"x", {})
    assert (await store.delete(BUCKET, ["a\nb", "a\r\nb"])).failed == ()
    assert await paths(store) == ["a b", "ab"]


@pytest.mark.slow
async def test_a_listing_goes_on_over_many_pages_and_a_lost_page_is_asked_for_again(
    store: S3Store, faulty: S3Store, proxy: FaultProxy
) -> None:
    keys = [f"many/{n:05d}" for n in range(1005)]
    async with anyio.create_task_group() as tasks:
        for start in range(16):
            tasks.start_soon(put_some, store, keys[start::16])
    proxy.rules += [Rule(CutReply(5000), target="list-type=2"), Rule(Answer(503, "SlowDown"), target="continuation")]
    assert await paths(faulty, "many/") == [key.removeprefix("many/") for key in keys]
    assert faulty.statistics().requests == {"list": 4}
    assert faulty.statistics().retries == {"transient": 1, "throttle": 1}


@pytest.mark.parametrize(
    "body",
    [
        b"<Error><Code>InternalError</Code></Error>",
        b"<html>please log in</html>",
        b"<ListBucketResult/>",
        b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>",
        b"<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>k</Key></Contents></ListBucketResult>",
        b"",
    ],
)
async def test_what_is_no_listing_is_never_taken_for_an_empty_one(
    store: S3Store, faulty: S3Store, proxy: FaultProxy, body: bytes
) -> None:
    await store.put(BUCKET, "there", b"x", {})
    proxy.rules.append(Rule(Answer(200, body=body), target="list-type=2"))
    assert await paths(faulty) == ["there"]
    assert faulty.statistics().retries == {"transient": 1}


async def put_some(store: S3Store, keys: list[str]) -> None:
    for key in keys:
        await store.put(BUCKET, key, b"x", {})


# ------------------------------------------------------------------------------------------------------------- errors
async def test_missing_things_are_told_apart(store: S3Store) -> None:
    with pytest.raises(ObjectMissingError, match=f"s3://{BUCKET}/nothing"):
        await store.head(BUCKET, "nothing")
    with pytest.raises(ObjectAccessError, match="NoSuchBucket"):
        await store.put("no-such-bucket-at-all", "key", b"x", {})
    with pytest.raises(ObjectAccessError, match="NoSuchBucket"):
        [item async for item in store.list_objects("no-such-bucket-at-all", "")]


async def test_a_throttled_put_backs_off_as_the_server_says(endpoint: S3Endpoint, proxy: FaultProxy) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    config = S3Endpoint(proxy.url, "eu-west-1", endpoint.access_key, endpoint.secret_key)
    proxy.rules.append(Rule(Answer(503, "SlowDown", (("Retry-After", "3"),)), times=2))
    async with S3Store.open(config, sleep=sleep, rng=lambda: 0.5) as store:
        await store.put(BUCKET, "key", b"data", {})
    assert pauses == [3.5, 4.0]


async def test_attempts_end(faulty: S3Store, proxy: FaultProxy) -> None:
    proxy.rules.append(Rule(Answer(503, "SlowDown"), times=math.inf))
    with pytest.raises(ObjectThrottledError):
        await faulty.put(BUCKET, "key", b"x", {})
    assert len(proxy.seen) == 4


@pytest.mark.parametrize("fault", [CutRequest(70_000), CorruptRequest(100_000), StallRequest(65_536), LoseReply()])
@pytest.mark.slow
async def test_a_damaged_upload_is_sent_again(
    store: S3Store, faulty: S3Store, proxy: FaultProxy, fault: CutRequest | CorruptRequest | StallRequest | LoseReply
) -> None:
    data = os.urandom(24 << 20)
    proxy.rules.append(Rule(fault, method="PUT", times=2))
    etag = await faulty.put(BUCKET, "key", memoryview(data), {})
    assert etag == hashlib.md5(data, usedforsecurity=False).hexdigest()
    assert (await store.head(BUCKET, "key")).etag == etag
    assert [item.fault for item in proxy.seen] == [type(fault).__name__] * 2 + [""]
    assert faulty.statistics().retries["transient"] in {1, 2}  # aiohttp repeats once by itself after a disconnect


@pytest.mark.slow
async def test_a_silent_server_is_a_stall(faulty: S3Store, proxy: FaultProxy) -> None:
    proxy.rules.append(Rule(StallReply(), target="list-type=2", times=math.inf))
    with pytest.raises(StallError):
        await paths(faulty)


def test_credentials_are_not_shown() -> None:
    assert "hidden-secret" not in repr(S3Endpoint("http://h", "r", "user", "hidden-secret"))


# ------------------------------------------------------------------------------------------------------------ deletes
async def test_missing_keys_count_as_deleted(store: S3Store) -> None:
    await store.put(BUCKET, "there", b"x", {})
    result = await store.delete(BUCKET, ["there", "not there", "odd\x01"])
    assert (result.deleted, result.failed) == (("there", "not there", "odd\x01"), ())


@pytest.mark.parametrize("refusal", [Answer(501, "NotImplemented"), Answer(405, ""), Answer(400, "MalformedXML")])
async def test_a_server_without_batches_is_asked_once_then_key_by_key(
    store: S3Store, faulty: S3Store, proxy: FaultProxy, refusal: Answer
) -> None:
    for name in ("a", "b", "c"):
        await store.put(BUCKET, name, b"x", {})
    proxy.rules.append(Rule(refusal, method="POST", times=math.inf))
    assert (await faulty.delete(BUCKET, ["a", "b"])).deleted == ("a", "b")
    assert (await faulty.delete(BUCKET, ["c"])).deleted == ("c",)
    assert await paths(store) == []
    assert faulty.statistics().requests["delete-batch"] == 1
    assert len({seen.target for seen in proxy.seen if seen.method == "DELETE"}) == 3


async def test_batches_carry_md5_and_no_other_checksum(faulty: S3Store, proxy: FaultProxy) -> None:
    assert (await faulty.delete(BUCKET, ["a"])).deleted == ("a",)
    headers = proxy.seen[0].headers
    assert "content-md5" in headers
    assert not [name for name in headers if name.startswith(("x-amz-checksum", "x-amz-sdk"))]


async def test_keys_that_stay_are_reported_with_their_reason(faulty: S3Store, proxy: FaultProxy) -> None:
    body = (
        b"<DeleteResult><Error><Key>kept</Key><Code>AccessDenied</Code><Message>locked</Message></Error></DeleteResult>"
    )
    proxy.rules.append(Rule(Answer(200, body=body), method="POST"))
    result = await faulty.delete(BUCKET, ["gone", "kept"])
    assert result.deleted == ("gone",)
    assert [key for key, _ in result.failed] == ["kept"]
    assert "AccessDenied: locked" in result.failed[0][1]


# ------------------------------------------------------------------------------------------------------------ uploads
async def test_parts_survive_for_a_resume_and_join_to_the_object(store: S3Store) -> None:
    data = os.urandom(2 * PART_BYTES + 17)
    begun = await store.begin(BUCKET, "big", {"origin": "test"})
    first = await store.put_part(begun, 1, data[:PART_BYTES])
    await store.put_part(begun, 2, data[PART_BYTES : 2 * PART_BYTES])
    third = await store.put_part(begun, 3, data[2 * PART_BYTES :])
    listed = await store.list_parts(begun)
    assert listed[1] == (first, PART_BYTES)
    assert listed[3] == (third, 17)
    assert await paths(store) == []
    etag = await store.complete(begun, [listed[number][0] for number in (1, 2, 3)])
    head = await store.head(BUCKET, "big")
    assert (head.etag, head.size_bytes) == (etag, len(data))


async def test_an_aborted_upload_is_gone_and_aborting_again_is_fine(store: S3Store) -> None:
    begun = await store.begin(BUCKET, "big", {})
    etag = await store.put_part(begun, 1, b"part")
    await store.abort(begun)
    await store.abort(begun)
    with pytest.raises(UploadMissingError):
        await store.list_parts(begun)
    with pytest.raises(UploadMissingError):
        await store.complete(begun, [etag])


@pytest.mark.parametrize("fault", [LoseReply(), Answer(200, "InternalError"), Answer(500, "InternalError")])
async def test_completing_survives_a_lost_or_failed_reply(
    store: S3Store, faulty: S3Store, proxy: FaultProxy, fault: LoseReply | Answer
) -> None:
    data = os.urandom(PART_BYTES + 1)
    begun = await store.begin(BUCKET, "big", {})
    etags = [await store.put_part(begun, 1, data[:PART_BYTES]), await store.put_part(begun, 2, data[PART_BYTES:])]
    proxy.rules.append(Rule(fault, method="POST"))
    etag = await faulty.complete(begun, etags)
    assert (await store.head(BUCKET, "big")).etag == etag
    assert faulty.statistics().requests["complete"] == 2


async def test_another_object_under_the_key_is_not_taken_for_a_completed_upload(
    store: S3Store, faulty: S3Store, proxy: FaultProxy
) -> None:
    await upload(store, "big", b"something else")
    begun = await store.begin(BUCKET, "big", {})
    etag = await store.put_part(begun, 1, b"part")
    proxy.rules.append(Rule(Answer(404, "NoSuchUpload"), method="POST"))
    with pytest.raises(UploadMissingError):
        await faulty.complete(begun, [etag])
    await store.abort(begun)


async def test_joining_other_parts_is_an_integrity_failure(store: S3Store, faulty: S3Store, proxy: FaultProxy) -> None:
    begun = await store.begin(BUCKET, "big", {})
    etag = await store.put_part(begun, 1, b"part")
    wrong = f'"{"0" * 32}-1"'
    proxy.rules += [
        Rule(Answer(200, body=f"<R><ETag>{wrong}</ETag></R>".encode()), method="POST"),
        Rule(AlterReply(("etag",), (("ETag", wrong),)), method="HEAD"),
    ]
    await upload(store, "big", b"something")
    with pytest.raises(DigestMismatchError, match="S3 server"):
        await faulty.complete(begun, [etag])
    await store.abort(begun)


# ---------------------------------------------------------------------------------------------------------- checksums
async def test_a_single_part_object_is_held_to_its_md5_without_a_request(store: S3Store) -> None:
    etag = await store.put(BUCKET, "small", b"small", {})
    before = store.statistics().requests
    claim = await store.source_checksum(BUCKET, "small", etag, 5)
    assert claim is not None
    assert (claim.algorithm, claim.value, claim.origin) == ("md5", etag, "s3-etag")
    assert store.statistics().requests == before
    assert await store.etag_is_md5(BUCKET, "small")


async def test_a_multipart_object_is_held_to_its_parts_where_their_size_can_be_learnt(
    store: S3Store, s3_server: S3Server
) -> None:
    data = os.urandom(2 * PART_BYTES + 17)
    etag, _ = await upload(store, "big", data)
    claim = await store.source_checksum(BUCKET, "big", etag, len(data))
    if s3_server.name == "rgw":
        assert claim is None  # it ignores part numbers
        return
    assert claim is not None
    assert (claim.algorithm, claim.part_size_bytes) == ("md5-parts", PART_BYTES)
    checksum = open_checksum(claim)
    assert checksum is not None
    checksum.update(memoryview(data))
    assert checksum.hexdigest() == claim.value == etag


async def test_a_single_part_upload_is_held_to_its_composite_everywhere(store: S3Store) -> None:
    etag, _ = await upload(store, "one", b"one part")
    claim = await store.source_checksum(BUCKET, "one", etag, 8)
    assert claim is not None
    checksum = open_checksum(claim)
    assert checksum is not None
    checksum.update(b"one part")
    assert checksum.hexdigest() == claim.value


@pytest.mark.parametrize(
    ("headers", "algorithm"),
    [
        ((("x-amz-checksum-sha256", "ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0="),), "sha256"),
        ((("x-amz-checksum-sha256", "ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0=-1"),), "sha256-parts"),
        ((("x-amz-checksum-sha256", "not base64"),), "md5-parts"),
    ],
)
async def test_a_stronger_checksum_of_the_server_is_preferred(
    store: S3Store, faulty: S3Store, proxy: FaultProxy, headers: tuple[tuple[str, str], ...], algorithm: str
) -> None:
    etag, _ = await upload(store, "one", b"abc")
    proxy.rules.append(Rule(AlterReply(add=headers), method="HEAD", times=math.inf))
    claim = await faulty.source_checksum(BUCKET, "one", etag, 3)
    assert claim is not None
    assert claim.algorithm == algorithm
    assert claim.value.startswith(hashlib.sha256(b"abc").hexdigest() if "sha" in algorithm else etag)


async def test_a_replaced_object_offers_no_checksum(store: S3Store) -> None:
    etag, _ = await upload(store, "one", b"old")
    await upload(store, "one", b"new")
    with pytest.raises(ObjectChangedError):
        await store.source_checksum(BUCKET, "one", etag, 3)


async def test_etags_of_encrypted_objects_are_no_md5(store: S3Store, faulty: S3Store, proxy: FaultProxy) -> None:
    await store.put(BUCKET, "secret", b"x", {})
    proxy.rules.append(Rule(AlterReply(add=(("x-amz-server-side-encryption", "aws:kms"),)), method="HEAD"))
    assert not await faulty.etag_is_md5(BUCKET, "secret")


# -------------------------------------------------------------------------------------------------------------- links
async def test_a_link_names_the_external_endpoint_and_opens_the_object(endpoint: S3Endpoint, store: S3Store) -> None:
    await store.put(BUCKET, "dir/a b+c.tar", b"payload", {})
    internal = S3Endpoint(
        "http://127.0.0.1:1", "eu-west-1", endpoint.access_key, endpoint.secret_key, endpoint.endpoint_url
    )
    async with opened(internal) as signer:
        link = await signer.presign(BUCKET, "dir/a b+c.tar", 60)
        assert signer.statistics().requests == {}
    assert link.startswith(endpoint.endpoint_url)
    assert "X-Amz-Expires=60" in link
    assert await anyio.to_thread.run_sync(download, link) == b"payload"


def download(link: str) -> bytes:
    with urllib.request.urlopen(link, timeout=10) as reply:  # noqa: S310 - the link is the test's own
        body: bytes = reply.read()
    return body
