"""The invariants of ARCHITECTURE.md: each holds, and the check that says so notices when it is broken on purpose.

Every pair is one check, run once on the real parts and once on parts of which one is broken. The invariants about kills
and hosts are proved with real processes in ``test_crash.py``; here they are pinned within one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from mover.cleanup import Registered, release_source
from mover.errors import DatasetBusyError, ManifestError, MoverError, ObjectChangedError, ShortReadError
from mover.journal import Journal
from mover.model import Datablock, Evidence, EvidenceLevel, Manifest, ManifestMember, archive_id, raw_object_key
from mover.policies.limits import Limit
from mover.policies.retry import RetryPolicy
from mover.streams.hashing import digest_of
from mover.streams.interfaces import Buffer, ByteRange, Consumer
from mover.streams.lts import LtsFolder, list_datasets
from mover.streams.lts_mount import filesystem_of
from mover.streams.lts_writer import LtsWriter
from mover.streams.memory import BufferPool
from mover.streams.page_cache import drop_pages, resident_bytes
from mover.streams.pipe import Lanes, Move, WindowDigest
from mover.streams.s3 import S3Store
from mover.streams.s3_calls import S3Endpoint
from mover.streams.s3_read import S3Reader
from mover.streams.units import WindowKey
from mover.verify import ReadBack
from tests.datasets import DATASET, random_bytes
from tests.engines import lay_out, small_windows
from tests.lts_mounts import PLAIN
from tests.servers import S3Server, fresh_bucket, object_keys, put_objects

pytestmark = pytest.mark.anyio

KIB = 1 << 10
FILES = {
    "a": random_bytes(300 * KIB),
    **{f"b{number}": random_bytes(9 * KIB, number) for number in range(30)},
    "c": b"",
}
PROOF = Evidence(EvidenceLevel.READ_BACK, "2024-01-01T00:00:00Z", "host", "xxh3_128:00", "dropped")


class MemoryReader:
    """Objects in memory, read as from a server: pinned by their digests, in pieces, with every byte counted."""

    def __init__(self, objects: dict[str, bytes], pool: BufferPool) -> None:
        self.objects, self.pool = objects, pool
        self.received_bytes = 0
        self.held_bytes = self.peak_bytes = 0

    def check(self, item: ByteRange, body: bytes) -> None:
        if digest_of(body) != item.etag:
            raise ObjectChangedError("GET", item.location, "ETag", item.etag, digest_of(body))

    def body(self, item: ByteRange) -> bytes:
        body = self.objects[item.key]
        self.check(item, body)
        return body[item.start : item.end]

    async def fetch(self, item: ByteRange, view: memoryview) -> None:
        body = self.body(item)
        self.held_bytes += len(body)
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        for _ in range(10):
            await anyio.lowlevel.checkpoint()
        self.held_bytes -= len(body)
        self.received_bytes += len(body)
        view[:] = body

    async def stream(self, item: ByteRange, buffer: memoryview, consume: Consumer) -> None:
        body = self.body(item)
        size_bytes = 10_000
        for start in range(0, len(body), size_bytes):
            piece = body[start : start + size_bytes]
            buffer[: len(piece)] = piece
            await anyio.to_thread.run_sync(consume, buffer[: len(piece)])
            self.received_bytes += len(piece)


class Site:
    """One datablock on its way from memory to a real file. Tests replace the parts that they break."""

    def __init__(self, folder: Path) -> None:
        self.pool = BufferPool(2 << 20)
        self.reader = MemoryReader(dict(FILES), self.pool)
        etags = {path: digest_of(body) for path, body in FILES.items()}
        self.datablock: Datablock = lay_out({path: len(body) for path, body in FILES.items()}, etags)
        self.final = folder / self.datablock.name
        self.writer_type: type[LtsWriter] = LtsWriter
        self.recorded: dict[WindowKey, str] = {}

    def record(self, windows: Sequence[WindowDigest]) -> None:
        self.recorded.update({(index, window): digest for index, window, digest in windows})

    async def move(self, durable: dict[WindowKey, str] | None = None) -> dict[WindowKey, str]:
        lanes = Lanes(self.reader, self.pool, requests=16, streams=2, retry=RetryPolicy(attempts=2, base_s=0.001))
        resume = bool(durable)
        writer = self.writer_type.open(self.final, self.datablock.size_bytes, PLAIN, resume=resume)
        try:
            move = Move(self.datablock, writer, lanes, _locate, self.record, durable or {})
            await move.run()
            writer.commit()
        finally:
            writer.close()
        return move.digests

    def breaks(self, windows: dict[WindowKey, str]) -> int:
        comparison = ReadBack(self.datablock, windows, {})
        comparison.feed(memoryview(self.final.read_bytes()))
        return len(comparison.finish().breaks)


def _locate(member: object, start: int, end: int) -> ByteRange:
    path, etag, size_bytes = member.path, member.etag, member.size_bytes  # type: ignore[attr-defined]
    return ByteRange("memory", path, etag, size_bytes, start, end)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    small_windows(monkeypatch, window_bytes=64 * KIB, small_bytes=32 * KIB)
    return Site(tmp_path)


@asynccontextmanager
async def noticed() -> AsyncIterator[None]:
    """The check inside fails, as it must when something is broken on purpose."""
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        yield


# ---------------------------------------------------- 1: a source goes only with read-back evidence and a registration
async def check_release(server: S3Server, release: Callable[[S3Store, str, Manifest], object]) -> None:
    """Whatever is released without read-back evidence is still there."""
    with fresh_bucket(server) as bucket:
        key = raw_object_key(DATASET, "a")
        etag = put_objects(server, bucket, {key: b"a"})[key]
        member = ManifestMember("a", key, etag, 1, 0, 0, 512, ("0" * 32,))
        written = Evidence(EvidenceLevel.WRITTEN, PROOF.at, "host", PROOF.digest, "dropped")
        name = archive_id(DATASET, 1)
        unproved = Manifest(DATASET, 1, 1, name, "f", 1, 1, 1, PROOF.digest, (member,), (written,), "now", "mover")
        endpoint = S3Endpoint(server.endpoint_url, server.region, server.access_key, server.secret_key)
        async with S3Store.open(endpoint) as store:
            with suppress(ManifestError):
                await release(store, bucket, unproved)  # type: ignore[misc]
        assert object_keys(server, bucket) == [key]


async def test_1_a_source_without_read_back_evidence_stays(moto_server: S3Server) -> None:
    await check_release(moto_server, lambda store, bucket, item: release_source(store, bucket, [Registered(item)]))


async def test_1_broken_a_release_that_asks_for_no_evidence_is_noticed(moto_server: S3Server) -> None:
    async def careless(store: S3Store, bucket: str, manifest: Manifest) -> None:
        await store.delete(bucket, [member.key for member in manifest.members])

    async with noticed():
        await check_release(moto_server, careless)


# ------------------------------------------------------------------------ 2: without a manifest it does not exist
def check_invisible(root: Path, listed: Callable[[Path], list[str]]) -> None:
    folder = LtsFolder.open(root, DATASET, PLAIN)
    name = archive_id(DATASET, 1).rpartition("/")[2]
    folder.datablock_path(name).write_bytes(b"x")
    assert listed(root) == []
    assert folder.manifest_names() == []
    folder.write_manifest(name, b"{}")
    assert listed(root) == [DATASET]


def test_2_a_datablock_without_manifest_does_not_exist(tmp_path: Path) -> None:
    check_invisible(tmp_path, lambda root: list(list_datasets(root)))


async def test_2_broken_a_listing_by_files_is_noticed(tmp_path: Path) -> None:
    async with noticed():
        check_invisible(tmp_path, lambda root: [DATASET for _ in root.rglob("*.tar")])


# -------------------------------------------------------------------- 3: whole, under the same ETag, or not at all
async def check_pinned(site: Site) -> None:
    site.reader.objects["b7"] = random_bytes(9 * KIB, 99)
    with pytest.raises(ObjectChangedError):
        await site.move()
    assert not site.final.exists()


async def test_3_an_object_that_changed_fails_the_datablock(site: Site) -> None:
    await check_pinned(site)


async def test_3_broken_a_reader_that_ignores_etags_is_noticed(site: Site) -> None:
    class Careless(MemoryReader):
        def check(self, item: ByteRange, body: bytes) -> None:
            """Takes whatever there is."""

    site.reader = Careless(dict(FILES), site.pool)
    async with noticed():
        await check_pinned(site)


async def test_3_a_window_that_ends_short_is_never_committed(site: Site) -> None:
    class Short(MemoryReader):
        async def stream(self, item: ByteRange, buffer: memoryview, consume: Consumer) -> None:  # noqa: ARG002
            raise ShortReadError("GET", item.location, item.size_bytes, 0)

    site.reader = Short(dict(FILES), site.pool)
    with pytest.raises(ShortReadError):
        await site.move()
    assert not site.final.exists()


# ----------------------------------------------------------------------------------- 4: the run executes the plan
async def check_planned(site: Site) -> None:
    windows = await site.move()
    assert site.final.stat().st_size == site.datablock.size_bytes
    assert site.breaks(windows) == 0


async def test_4_the_file_is_exactly_the_planned_one(site: Site) -> None:
    await check_planned(site)


@pytest.mark.parametrize("dropped", [0, 3, 20])
async def test_4_broken_a_sink_that_drops_one_write_is_noticed(site: Site, dropped: int) -> None:
    class Dropping(LtsWriter):
        writes = 0

        def write_at(self, offset_bytes: int, buffers: Sequence[Buffer]) -> None:
            type(self).writes += 1
            if type(self).writes != dropped + 1:
                super().write_at(offset_bytes, buffers)

    site.writer_type = Dropping
    async with noticed():
        await check_planned(site)


# ------------------------------------------------------------------------------------------- 5: memory is bounded
async def check_bounded(site: Site, limit_bytes: int) -> None:
    await site.move()
    assert 0 < site.reader.peak_bytes <= limit_bytes


async def test_5_what_is_in_flight_fits_the_configured_buffer(site: Site) -> None:
    site.datablock = lay_out(
        {f"b{number}": 9 * KIB for number in range(30)}, {f"b{n}": digest_of(FILES[f"b{n}"]) for n in range(30)}
    )
    site.pool = site.reader.pool = BufferPool(40 * KIB)
    await check_bounded(site, 40 * KIB)


async def test_5_broken_a_pool_that_does_not_count_is_noticed(site: Site) -> None:
    class Boundless(BufferPool):
        def _hold(self, size_bytes: int) -> None:
            """Hands out whatever is asked for."""

        def _release(self, size_bytes: int) -> None:
            """Takes anything back."""

    site.pool = site.reader.pool = Boundless(2 << 20)
    async with noticed():
        await check_bounded(site, 40 * KIB)


# ------------------------------------------------------------- 6: what is durable is not fetched again after a kill
async def check_resumed(site: Site, journal: Journal) -> None:
    class Failing(MemoryReader):
        async def fetch(self, item: ByteRange, view: memoryview) -> None:
            if item.key == "b29":
                await anyio.sleep(0.05)
                raise ShortReadError("GET", item.location, 1, 0)
            await super().fetch(item, view)

    with journal.open(DATASET, 1) as opened:
        opened.begin("plan", site.datablock.size_bytes, 1)
        site.record = opened.add_windows  # type: ignore[method-assign]
        site.reader = Failing(dict(FILES), site.pool)
        with pytest.raises(MoverError):
            await site.move()
        done_bytes = site.reader.received_bytes
    assert done_bytes
    with journal.open(DATASET, 1) as opened:
        site.record = opened.add_windows  # type: ignore[method-assign]
        site.reader = MemoryReader(dict(FILES), site.pool)
        windows = await site.move(dict(opened.state.windows))
    assert site.breaks(windows) == 0
    assert site.reader.received_bytes + done_bytes < site.datablock.payload_bytes + 40 * KIB


async def test_6_a_run_after_a_failed_one_fetches_only_what_is_missing(site: Site, tmp_path: Path) -> None:
    await check_resumed(site, Journal(tmp_path / "scratch"))


async def test_6_broken_a_journal_that_forgets_is_noticed(site: Site, tmp_path: Path) -> None:
    class Forgetful(Journal):
        def open(self, dataset_id: str, number: int):  # type: ignore[no-untyped-def]  # noqa: ANN202
            self.forget(dataset_id)
            return super().open(dataset_id, number)

    async with noticed():
        await check_resumed(site, Forgetful(tmp_path / "scratch"))


# ---------------------------------------------------------------------------- 7: two runs on one dataset never mix
def check_exclusive(hold: Callable[[str], object]) -> None:
    hold("first")
    with pytest.raises(DatasetBusyError, match="first"):
        hold("second")


async def test_7_a_dataset_has_one_run_at_a_time(tmp_path: Path) -> None:
    folder = LtsFolder.open(tmp_path, DATASET, PLAIN)
    check_exclusive(folder.lock)


async def test_7_broken_a_lock_that_lets_everybody_in_is_noticed() -> None:
    async with noticed():
        check_exclusive(lambda _holder: None)


# --------------------------------------------------------------- 8: verification reads the storage, not this host
def check_dropped(file: Path, drop: Callable[[int], None]) -> None:
    if filesystem_of(file.parent) in {"tmpfs", "ramfs"}:
        pytest.skip("the storage of this folder is memory")
    with file.open("wb") as written:
        written.write(bytes(1 << 20))
    with file.open("rb") as read:
        assert resident_bytes(read.fileno()) > 0
        drop(read.fileno())
        assert resident_bytes(read.fileno()) == 0


def test_8_the_page_cache_is_dropped_before_the_read_back(tmp_path: Path) -> None:
    check_dropped(tmp_path / "x", drop_pages)


async def test_8_broken_a_cache_that_is_kept_is_noticed(tmp_path: Path) -> None:
    async with noticed():
        check_dropped(tmp_path / "x", lambda _fd: None)


# ------------------------------------------------------------------------------------ 9: limits hold in one process
async def check_limit(limit: Limit) -> None:
    inside = peak = 0

    async def work() -> None:
        nonlocal inside, peak
        async with limit.slot("x"):
            inside += 1
            peak = max(peak, inside)
            await anyio.lowlevel.checkpoint()
            inside -= 1

    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(work)
    assert peak == 2 == limit.statistics().peak


async def test_9_no_more_tasks_run_than_the_limit_has_slots() -> None:
    await check_limit(Limit("MOVE_TO_LTS_LIMIT", 2))


async def test_9_broken_a_limit_that_lets_everybody_in_is_noticed() -> None:
    class Open(Limit):
        @asynccontextmanager
        async def slot(self, holder: str) -> AsyncIterator[None]:  # noqa: ARG002 - the real one's
            yield

    async with noticed():
        await check_limit(Open("MOVE_TO_LTS_LIMIT", 2))


# ---------------------------------------------------------------------------------------------- 10: secrets stay secret
async def check_secret(
    endpoint: S3Endpoint, caplog: pytest.LogCaptureFixture, say: Callable[[S3Endpoint], str]
) -> None:
    caplog.set_level(0)
    item = ByteRange("bucket", "key", "e", 1, 0, 1)
    told = [say(endpoint)]
    async with S3Reader.open(endpoint, threads=1) as reader, S3Store.open(endpoint, policy=RetryPolicy(1)) as store:
        for call in (
            reader.fetch(item, memoryview(bytearray(1))),
            reader.stream(item, memoryview(bytearray(1)), lambda _: None),
            store.head("b", "k"),
        ):
            with pytest.raises(MoverError) as caught:
                await call
            told += [repr(caught.value), str(caught.value)]
    mine = [record.getMessage() for record in caplog.records if record.name.startswith("mover")]
    assert not [text for text in told + mine if endpoint.secret_key in text or endpoint.access_key in text]


def unreachable() -> S3Endpoint:
    return S3Endpoint("http://127.0.0.1:1", "r", "the-access-key", "the-secret-key")


async def test_10_no_error_log_or_repr_tells_a_secret(caplog: pytest.LogCaptureFixture) -> None:
    await check_secret(unreachable(), caplog, repr)


async def test_10_broken_a_text_with_the_secret_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    async with noticed():
        await check_secret(unreachable(), caplog, lambda endpoint: f"login with {endpoint.secret_key}")
