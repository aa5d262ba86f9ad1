"""Reading objects from real servers, through a proxy that breaks things: pinned, resumed, watched, cancelled."""

from __future__ import annotations

import math
import random
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from mover.errors import (
    MoverError,
    ObjectAccessError,
    ObjectChangedError,
    ObjectMissingError,
    ObjectThrottledError,
    ObjectTransientError,
    ShortReadError,
    StallError,
)
from mover.policies.retry import retry_class
from mover.streams.interfaces import ByteRange
from mover.streams.s3_calls import S3Endpoint
from mover.streams.s3_read import S3Reader
from tests.certificates import server_context
from tests.faults import AlterReply, AlterRequest, Answer, CutReply, Fault, FaultProxy, Rule, StallReply, StallRequest
from tests.faults import TrickleReply as Trickle
from tests.servers import S3Server, fresh_bucket, put_objects

pytestmark = pytest.mark.anyio

BODY = random.Random(1).randbytes(3_000_001)
BUFFER_BYTES = 1 << 20
STALL_S = 0.4
# Names that some layer of a client may fold, decode or refuse.
NAMES = [
    "plain.tif",
    " lead and trail ",
    "caf\u00e9",
    "cafe\u0301",
    "+&=%#?@:;,$!'()*[]{}|\\^`\"<>~.tif",
    "%2F%25",
    "line\nbreak",
    "tab\tcarriage\rreturn",
    ".hidden/..dots/...",
    "./dot",
    "a//b",
    "folder/",
    "\u65e5\u672c\u8a9e/\U0001f52c.mrc",
    "\u200fright\u202eto\u2028left",
    "n" * 1024,
    "\u00e9" * 512,
]


class Received:
    """What a stream handed over, in order."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def __call__(self, piece: memoryview) -> None:
        self.pieces.append(bytes(piece))

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)


def endpoint(server: S3Server, url: str = "", secret_key: str = "", stall_timeout_s: float = 20.0) -> S3Endpoint:
    return S3Endpoint(
        url or server.endpoint_url,
        server.region,
        server.access_key,
        secret_key or server.secret_key,
        stall_timeout_s=stall_timeout_s,
    )


@pytest.fixture(scope="module", params=["moto", pytest.param("rgw", marks=pytest.mark.rgw)])
def server(request: pytest.FixtureRequest) -> S3Server:
    """Each server once for all tests that leave the object as it is."""
    found: S3Server = request.getfixturevalue(f"{request.param}_server")
    return found


@pytest.fixture(scope="module")
def bucket(server: S3Server) -> Iterator[str]:
    with fresh_bucket(server) as bucket:
        yield bucket


@pytest.fixture(scope="module")
def item(server: S3Server, bucket: str) -> ByteRange:
    """The whole of an object of BODY."""
    etag = put_objects(server, bucket, {"body": BODY})["body"]
    return ByteRange(bucket, "body", etag, len(BODY), 0, len(BODY))


def part_of(item: ByteRange, start: int, end: int) -> ByteRange:
    return ByteRange(item.bucket, item.key, item.etag, item.object_bytes, start, end)


@pytest.fixture
async def reader(server: S3Server) -> AsyncIterator[S3Reader]:
    async with S3Reader.open(endpoint(server), threads=2) as reader:
        yield reader


@asynccontextmanager
async def through_proxy(
    server: S3Server, *rules: Fault, stall_timeout_s: float = 20.0
) -> AsyncIterator[tuple[S3Reader, FaultProxy]]:
    """A reader whose every request meets the next of ``rules``, the last one for ever."""
    async with FaultProxy(server.endpoint_url) as proxy:
        proxy.rules += [Rule(fault) for fault in rules]
        if rules:
            proxy.rules[-1].times = math.inf
        async with S3Reader.open(endpoint(server, proxy.url, "", stall_timeout_s), threads=2) as reader:
            yield reader, proxy


async def stream(reader: S3Reader, item: ByteRange, buffer_bytes: int = BUFFER_BYTES) -> bytes:
    received = Received()
    await reader.stream(item, memoryview(bytearray(buffer_bytes)), received)
    return received.body


async def fetch(reader: S3Reader, item: ByteRange) -> bytes:
    body = bytearray(item.size_bytes)
    await reader.fetch(item, memoryview(body))
    return bytes(body)


async def fails(reader: S3Reader, item: ByteRange, way: str) -> MoverError:
    """The error of one attempt, by either way of reading."""
    with pytest.raises(MoverError) as caught:
        await (stream(reader, item) if way == "stream" else fetch(reader, item))
    return caught.value


# ----------------------------------------------------------------------------------------------------------- all well
@pytest.mark.parametrize(("start", "end"), [(0, len(BODY)), (1, len(BODY)), (0, 1), (1_048_570, 2_200_003)])
async def test_whole_objects_and_ranges_arrive_exactly_both_ways(
    reader: S3Reader, item: ByteRange, start: int, end: int
) -> None:
    wanted = part_of(item, start, end)
    assert await fetch(reader, wanted) == BODY[start:end]
    assert await stream(reader, wanted) == BODY[start:end]
    assert await stream(reader, wanted, 65_537) == BODY[start:end]
    assert reader.statistics().requests == 3
    assert reader.statistics().received_bytes == 3 * (end - start)


async def test_awkward_names_reach_exactly_their_objects(server: S3Server, bucket: str, reader: S3Reader) -> None:
    names = [name for name in NAMES if server.name != "moto" or name != "line\nbreak"]  # moto routes no such key
    etags = put_objects(server, bucket, {name: name.encode() for name in names})
    for name in names:
        size_bytes = len(name.encode())
        item = ByteRange(bucket, name, etags[name], size_bytes, 0, size_bytes)
        assert await fetch(reader, item) == name.encode(), name
        assert await stream(reader, item) == name.encode(), name


async def test_empty_objects_are_read_without_a_range(server: S3Server, bucket: str, reader: S3Reader) -> None:
    item = ByteRange(bucket, "empty", put_objects(server, bucket, {"empty": b""})["empty"], 0, 0, 0)
    assert await fetch(reader, item) == b""
    assert await stream(reader, item) == b""


async def test_connections_are_used_again(server: S3Server, item: ByteRange) -> None:
    async with through_proxy(server) as (reader, proxy):
        for _ in range(5):
            assert await stream(reader, item) == BODY
        assert len(proxy.seen) == 5
        assert proxy.connections == 1


async def test_a_kept_connection_that_the_server_closed_is_replaced_without_an_error(
    server: S3Server, item: ByteRange
) -> None:
    async with through_proxy(server, CutReply(len(BODY)), AlterReply()) as (reader, proxy):
        assert await stream(reader, item) == BODY  # and closes behind it
        assert await stream(reader, item) == BODY
        assert proxy.connections == 2


# ------------------------------------------------------------------------------------------------------------- pinned
@pytest.mark.parametrize("way", ["fetch", "stream"])
@pytest.mark.parametrize("ranged", [False, True])
async def test_a_replaced_object_is_refused(
    server: S3Server, bucket: str, reader: S3Reader, way: str, *, ranged: bool
) -> None:
    etag = put_objects(server, bucket, {"changing": b"old!"})["changing"]
    put_objects(server, bucket, {"changing": b"new!"})
    error = await fails(reader, ByteRange(bucket, "changing", etag, 4, 0, 2 if ranged else 4), way)
    assert isinstance(error, ObjectChangedError)
    assert not error.retryable


@pytest.mark.parametrize("way", ["fetch", "stream"])
@pytest.mark.parametrize("ranged", [False, True])
async def test_a_replaced_object_is_refused_although_the_server_ignores_the_pin(
    moto_server: S3Server, way: str, *, ranged: bool
) -> None:
    with fresh_bucket(moto_server) as bucket:
        etag = put_objects(moto_server, bucket, {"changing": b"old!"})["changing"]
        put_objects(moto_server, bucket, {"changing": b"new!"})
        item = ByteRange(bucket, "changing", etag, 4, 0, 2 if ranged else 4)
        async with through_proxy(moto_server, AlterRequest(remove=("if-match",))) as (reader, proxy):
            error = await fails(reader, item, way)
        assert isinstance(error, ObjectChangedError)
        assert proxy.seen[0].fault == "AlterRequest"


@pytest.mark.parametrize("way", ["fetch", "stream"])
@pytest.mark.parametrize("ranged", [False, True])
async def test_a_replaced_object_is_refused_on_a_server_that_knows_no_pins(
    rclone_server: S3Server, way: str, *, ranged: bool
) -> None:
    with fresh_bucket(rclone_server) as bucket:
        etag = put_objects(rclone_server, bucket, {"changing": b"old!"})["changing"]
        put_objects(rclone_server, bucket, {"changing": b"new!"})
        async with S3Reader.open(endpoint(rclone_server), threads=1) as reader:
            error = await fails(reader, ByteRange(bucket, "changing", etag, 4, 0, 2 if ranged else 4), way)
        assert isinstance(error, ObjectChangedError)


@pytest.mark.parametrize("way", ["fetch", "stream"])
async def test_a_reply_that_names_no_etag_proves_nothing_and_is_refused(
    server: S3Server, item: ByteRange, way: str
) -> None:
    async with through_proxy(server, AlterReply(remove=("etag",))) as (reader, _):
        assert not (await fails(reader, item, way)).retryable


@pytest.mark.parametrize("way", ["fetch", "stream"])
async def test_a_missing_object_is_named(reader: S3Reader, item: ByteRange, way: str) -> None:
    gone = ByteRange(item.bucket, "gone", item.etag, 5, 0, 5)
    error = await fails(reader, gone, way)
    assert isinstance(error, ObjectMissingError)
    assert gone.location in str(error)


@pytest.mark.parametrize("way", ["fetch", "stream"])
@pytest.mark.parametrize(
    "content_range", ["bytes 1-4/{0}", "bytes 0-9/{0}", "bytes 0-4/*", "bytes 0-4/9{0}", "nonsense", ""]
)
async def test_a_wrong_content_range_is_refused(
    server: S3Server, item: ByteRange, way: str, content_range: str
) -> None:
    header = (("Content-Range", content_range.format(len(BODY))),) if content_range else ()
    async with through_proxy(server, AlterReply(remove=("content-range",), add=header)) as (reader, _):
        error = await fails(reader, part_of(item, 0, 5), way)
    assert isinstance(error, ObjectAccessError | ObjectChangedError)


async def test_a_content_length_that_is_no_number_is_an_error_of_the_tree(server: S3Server, item: ByteRange) -> None:
    altered = AlterReply(remove=("content-length",), add=(("Content-Length", "many"),))
    async with through_proxy(server, altered) as (reader, _):
        assert isinstance(await fails(reader, item, "stream"), ObjectTransientError)


# ------------------------------------------------------------------------------------------------------ broken bodies
@pytest.mark.parametrize("after_bytes", [0, 1, 1_500_000, len(BODY) - 1])
async def test_a_cut_stream_keeps_what_came_and_goes_on_from_there(
    server: S3Server, item: ByteRange, after_bytes: int
) -> None:
    async with through_proxy(server, CutReply(after_bytes), AlterReply()) as (reader, proxy):
        received, buffer = Received(), memoryview(bytearray(BUFFER_BYTES))
        with pytest.raises(ShortReadError) as caught:
            await reader.stream(item, buffer, received)
        assert received.body == BODY[:after_bytes]
        assert caught.value.found_bytes == after_bytes
        assert all(received.pieces), "no piece is empty"
        await reader.stream(part_of(item, after_bytes, len(BODY)), buffer, received)
        assert received.body == BODY
        assert proxy.seen[1].headers.get("range") == (f"bytes={after_bytes}-{len(BODY) - 1}" if after_bytes else None)
        assert reader.statistics().received_bytes == len(BODY), "no byte came twice"


async def test_a_cut_body_is_never_returned_short(server: S3Server, item: ByteRange) -> None:
    async with through_proxy(server, CutReply(2_000_000)) as (reader, _):
        error = await fails(reader, item, "fetch")
    assert isinstance(error, ObjectTransientError)


# ------------------------------------------------------------------------------------------------------------- stalls
@pytest.mark.parametrize("way", ["fetch", "stream"])
@pytest.mark.parametrize("fault", [StallRequest(), StallReply(0), StallReply(1_300_000)], ids=repr)
async def test_a_stall_is_an_error_of_its_own_soon_after_the_timeout(
    server: S3Server, item: ByteRange, way: str, fault: Fault
) -> None:
    async with through_proxy(server, fault, stall_timeout_s=STALL_S) as (reader, _):
        began = anyio.current_time()
        error = await fails(reader, item, way)
        # the kernel counts a wait from the start of a call: bytes at its beginning double the time at most
        assert STALL_S * 0.9 < anyio.current_time() - began < 3 * STALL_S + 2
    assert isinstance(error, StallError)


@pytest.mark.parametrize("way", ["fetch", "stream"])
async def test_a_slow_body_that_keeps_coming_is_no_stall(server: S3Server, item: ByteRange, way: str) -> None:
    async with through_proxy(server, Trickle(pieces=10, pause_s=STALL_S / 4), stall_timeout_s=STALL_S) as (reader, _):
        body = await stream(reader, item) if way == "stream" else await fetch(reader, item)
    assert body == BODY


# ------------------------------------------------------------------------------------------------- refusals by class
@pytest.mark.parametrize("way", ["fetch", "stream"])
@pytest.mark.parametrize(
    ("answer", "kind", "retry"),
    [
        (Answer(503, "SlowDown", (("Retry-After", "7"),)), ObjectThrottledError, "throttle"),
        (Answer(500, "InternalError"), ObjectTransientError, "transient"),
        (Answer(403, "AccessDenied"), ObjectAccessError, "permanent"),
        (Answer(404, "NoSuchBucket"), ObjectAccessError, "permanent"),
        (Answer(404, "NoSuchKey"), ObjectMissingError, "permanent"),
        (Answer(412, "PreconditionFailed"), ObjectChangedError, "permanent"),
    ],
    ids=lambda value: value.code if isinstance(value, Answer) else "",
)
async def test_refusals_are_told_apart(
    server: S3Server, item: ByteRange, way: str, answer: Answer, kind: type[MoverError], retry: str
) -> None:
    async with through_proxy(server, answer) as (reader, _):
        error = await fails(reader, item, way)
    assert isinstance(error, kind)
    assert retry_class(error) == retry
    if isinstance(error, ObjectThrottledError):
        assert error.retry_after_s == 7


@pytest.mark.parametrize("way", ["fetch", "stream"])
async def test_a_wrong_secret_is_an_access_error_that_does_not_tell_it(rgw_server: S3Server, way: str) -> None:
    with fresh_bucket(rgw_server) as bucket:
        etag = put_objects(rgw_server, bucket, {"x": b"x"})["x"]
        async with S3Reader.open(endpoint(rgw_server, secret_key="not-the-secret"), threads=1) as reader:
            error = await fails(reader, ByteRange(bucket, "x", etag, 1, 0, 1), way)
    assert isinstance(error, ObjectAccessError)
    assert "not-the-secret" not in repr(error) + str(error)


async def test_nobody_listening_is_transient(server: S3Server, item: ByteRange) -> None:
    async with S3Reader.open(endpoint(server, "http://127.0.0.1:1"), threads=1) as reader:
        for way in ("fetch", "stream"):
            assert isinstance(await fails(reader, item, way), ObjectTransientError)


# -------------------------------------------------------------------------------------------------------- cancelling
async def test_cancelling_a_blocked_stream_returns_at_once_and_lets_go_of_buffer_and_thread(
    server: S3Server, item: ByteRange
) -> None:
    async with FaultProxy(server.endpoint_url) as proxy:
        proxy.rules.append(Rule(StallReply(100_000)))
        patient = S3Endpoint(proxy.url, server.region, server.access_key, server.secret_key, stall_timeout_s=50)
        async with S3Reader.open(patient, threads=1) as reader:
            buffer = bytearray(200_000)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(reader.stream, item, memoryview(buffer), Received())
                with anyio.fail_after(10):
                    while not any(buffer[90_000:100_000]):  # noqa: ASYNC110 - the kernel fills it
                        await anyio.sleep(0.01)
                began = anyio.current_time()
                tasks.cancel_scope.cancel()
            assert anyio.current_time() - began < 1
            left = bytes(buffer)
            assert await stream(reader, item) == BODY, "the one thread is free again"
            assert buffer == left


async def test_cancelling_a_fetch_returns_at_once(server: S3Server, item: ByteRange) -> None:
    async with through_proxy(server, StallReply(0)) as (reader, proxy):
        with anyio.move_on_after(0.2) as scope:
            await fetch(reader, item)
        assert scope.cancelled_caught
        assert len(proxy.seen) == 1


# --------------------------------------------------------------------------------------------------------------- TLS
@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """What a server of an authority needs that this process trusts through SSL_CERT_FILE."""
    context, authority = server_context(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    return context


@asynccontextmanager
async def over_tls(
    server: S3Server, tls: ssl.SSLContext, *faults: Fault, stall_timeout_s: float = 20.0
) -> AsyncIterator[S3Reader]:
    async with FaultProxy(server.endpoint_url, tls) as proxy:
        proxy.rules += [Rule(fault) for fault in faults]
        async with S3Reader.open(endpoint(server, proxy.url, "", stall_timeout_s), threads=1) as reader:
            yield reader


async def test_tls_is_checked_against_the_given_authority(
    server: S3Server, item: ByteRange, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with over_tls(server, tls) as reader:
        assert await stream(reader, item) == BODY
        assert await fetch(reader, part_of(item, 5, 50_000)) == BODY[5:50_000]
    monkeypatch.delenv("SSL_CERT_FILE")
    async with over_tls(server, tls) as reader:
        for way in ("stream", "fetch"):
            error = await fails(reader, item, way)
            assert isinstance(error, ObjectAccessError), "asking again would not help"


async def test_cuts_and_stalls_are_noticed_over_tls_as_well(
    server: S3Server, item: ByteRange, tls: ssl.SSLContext
) -> None:
    async with over_tls(server, tls, CutReply(1_200_000), StallReply(1_000_000), stall_timeout_s=STALL_S) as reader:
        received, buffer = Received(), memoryview(bytearray(BUFFER_BYTES))
        for kind in (ObjectTransientError, StallError):
            with pytest.raises(kind):
                await reader.stream(part_of(item, len(received.body), len(BODY)), buffer, received)
            assert BODY.startswith(received.body)
        assert len(received.body) == 2_200_000
        await reader.stream(part_of(item, len(received.body), len(BODY)), buffer, received)
    assert received.body == BODY


async def test_an_aborted_stream_over_tls_hands_on_nothing_but_the_body(
    server: S3Server, item: ByteRange, tls: ssl.SSLContext
) -> None:
    async with over_tls(server, tls) as reader:
        request = reader._ranges.request(item)  # noqa: SLF001 - the race is made certain here
        received = Received()

        def abort_after_the_first(piece: memoryview) -> None:
            received(piece)
            request.abort()

        def receive() -> None:
            request.receive(memoryview(bytearray(65_536)), abort_after_the_first)

        try:
            await anyio.to_thread.run_sync(receive)
        except MoverError:
            assert len(received.body) < len(BODY)
        assert BODY.startswith(received.body)
