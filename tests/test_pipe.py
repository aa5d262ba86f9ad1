"""The stream from objects to a datablock: exact, once, bounded, durable in the right order."""

from __future__ import annotations

import random
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from mover.datablock import from_landing_zone
from mover.errors import LtsError, ObjectAccessError, ObjectChangedError
from mover.model import Datablock, raw_object_key, window_count, window_range
from mover.policies.retry import RetryPolicy
from mover.streams.hashing import digest_of
from mover.streams.interfaces import Buffer
from mover.streams.lts_writer import LtsWriter
from mover.streams.memory import BufferPool
from mover.streams.pipe import Lanes, Move, WindowDigest
from mover.streams.s3_calls import S3Endpoint
from mover.streams.s3_read import S3Reader
from mover.streams.units import WindowKey
from tests.datasets import DATASET
from tests.engines import datablock_bytes, lay_out, read_tar, small_windows
from tests.faults import Answer, CutReply, FaultProxy, Rule, StallReply
from tests.lts_mounts import PLAIN
from tests.servers import S3Server, fresh_bucket, put_objects

pytestmark = pytest.mark.anyio

KIB = 1 << 10
RNG = random.Random(1)
FILES = {
    "a/large": RNG.randbytes(1_000_003),  # 4 windows
    **{f"b/{number:03d}": RNG.randbytes(number * 131) for number in range(40)},
    "c/empty": b"",
    "d/" + "n" * 200: RNG.randbytes(600 * KIB),
    "e/\u00e9": RNG.randbytes(5),
    "z/last and large": RNG.randbytes(256 * KIB + 1),
}
LARGE = "raw_files/a/large"


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    small_windows(monkeypatch, window_bytes=256 * KIB, small_bytes=64 * KIB)


@pytest.fixture(scope="module")
def server(moto_server: S3Server) -> S3Server:
    return moto_server


@pytest.fixture(scope="module")
def bucket(server: S3Server) -> Iterator[str]:
    with fresh_bucket(server) as bucket:
        yield bucket


@pytest.fixture(scope="module")
def datablock(server: S3Server, bucket: str) -> Datablock:
    keys = {raw_object_key(DATASET, path): body for path, body in FILES.items()}
    etags = put_objects(server, bucket, keys)
    sizes = {path: len(body) for path, body in FILES.items()}
    return lay_out(sizes, {path: etags[raw_object_key(DATASET, path)] for path in FILES})


class RecordingSink:
    """Writes to a real file and remembers where; calls back before each write."""

    def __init__(self, sink: LtsWriter) -> None:
        self.sink = sink
        self.events: list[str] = []
        self.extents: list[tuple[int, int]] = []
        self.fails_after_bytes = 1 << 60
        self.pool: BufferPool | None = None
        self._lock = threading.Lock()

    def write_at(self, offset_bytes: int, buffers: Sequence[Buffer]) -> None:
        length = sum(memoryview(buffer).nbytes for buffer in buffers)
        if sum(end - start for start, end in self.extents) + length > self.fails_after_bytes:
            raise LtsError("write", "x", "refused by a test")
        self.sink.write_at(offset_bytes, buffers)
        with self._lock:
            self.extents.append((offset_bytes, offset_bytes + length))
            self.events.append("write")

    def checkpoint(self) -> None:
        self.sink.checkpoint()
        self.events.append("checkpoint")

    def commit(self) -> None:
        self.sink.commit()

    def close(self) -> None:
        self.sink.close()

    def gaps_and_overlaps(self, size_bytes: int) -> list[tuple[int, int]]:
        """Places where the extents, in order, do not join."""
        ends = [0, *(end for _, end in sorted(self.extents))]
        starts = [*(start for start, _ in sorted(self.extents)), size_bytes]
        return [(end, start) for end, start in zip(ends, starts, strict=True) if end != start]


class Stage:
    """A move under way with everything around it."""

    def __init__(self, datablock: Datablock, final: Path, lanes: Lanes, durable: dict[WindowKey, str]) -> None:
        writer = LtsWriter.open(final, datablock.size_bytes, PLAIN, resume=bool(durable))
        self.final, self.lanes, self.sink = final, lanes, RecordingSink(writer)
        self.recorded: dict[WindowKey, str] = {}
        self.bucket = ""
        self.datablock, self.durable = datablock, durable

    def move(self, bucket: str) -> Move:
        locate = from_landing_zone(bucket, DATASET)
        return Move(self.datablock, self.sink, self.lanes, locate, self._record, self.durable)

    def _record(self, windows: Sequence[WindowDigest]) -> None:
        self.sink.events.append("record")
        self.recorded.update({(index, window): digest for index, window, digest in windows})


@asynccontextmanager
async def staged(
    server: S3Server,
    datablock: Datablock,
    final: Path,
    *,
    url: str = "",
    pool_bytes: int = 4 << 20,
    durable: dict[WindowKey, str] | None = None,
) -> AsyncIterator[Stage]:
    endpoint = S3Endpoint(
        url or server.endpoint_url, server.region, server.access_key, server.secret_key, stall_timeout_s=0.5
    )
    retry = RetryPolicy(attempts=3, base_s=0.001, throttle_base_s=0.001)
    async with S3Reader.open(endpoint, threads=2) as reader:
        lanes = Lanes(reader, BufferPool(pool_bytes), requests=8, streams=2, retry=retry)
        stage = Stage(datablock, final, lanes, durable or {})
        try:
            yield stage
        finally:
            stage.sink.close()


def digests() -> dict[WindowKey, str]:
    return {
        (index, window): digest_of(memoryview(body)[slice(*window_range(len(body), window))])
        for index, body in enumerate(FILES.values())
        for window in range(window_count(len(body)))
    }


async def test_mixed_members_become_exactly_the_planned_tar_and_each_byte_is_written_once(
    server: S3Server, bucket: str, datablock: Datablock, tmp_path: Path
) -> None:
    async with staged(server, datablock, tmp_path / "d_1.tar", pool_bytes=3 << 20) as stage:
        move = stage.move(bucket)
        await move.run()
        assert move.digests == digests() == stage.recorded
        assert stage.sink.gaps_and_overlaps(datablock.size_bytes) == []
        stage.sink.commit()
        assert (tmp_path / "d_1.tar").read_bytes() == datablock_bytes(datablock, FILES)
        assert read_tar(tmp_path / "d_1.tar") == FILES
        assert move.counters.received_bytes == datablock.payload_bytes
        statistics = stage.lanes.pool.statistics()
        assert statistics.peak_bytes <= statistics.limit_bytes
        assert statistics.used_bytes == 0


async def test_windows_are_recorded_only_after_a_checkpoint_that_follows_their_bytes(
    server: S3Server, bucket: str, datablock: Datablock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mover.streams.pipe._CHECKPOINT_BYTES", 1)
    async with staged(server, datablock, tmp_path / "d_1.tar") as stage:
        await stage.move(bucket).run()
        notable = [event for event in stage.sink.events if event != "write"]
        assert notable.count("record") > 3
        assert notable == ["checkpoint", "record"] * (len(notable) // 2)


@pytest.mark.parametrize("after_bytes", [0, 1, 100_000, 256 * KIB - 1])
async def test_a_cut_window_goes_on_where_it_stopped(
    server: S3Server, bucket: str, datablock: Datablock, tmp_path: Path, after_bytes: int
) -> None:
    async with FaultProxy(server.endpoint_url) as proxy:
        proxy.rules.append(Rule(CutReply(after_bytes), target="a/large"))
        proxy.rules.append(Rule(StallReply(after_bytes), target="z/last"))
        async with staged(server, datablock, tmp_path / "d_1.tar", url=proxy.url) as stage:
            move = stage.move(bucket)
            await move.run()
            stage.sink.commit()
            assert move.digests == digests()
            assert move.counters.received_bytes == datablock.payload_bytes, "no byte is fetched twice"
            assert stage.sink.gaps_and_overlaps(datablock.size_bytes) == []
        assert (tmp_path / "d_1.tar").read_bytes() == datablock_bytes(datablock, FILES)
        ranges = [int(seen.headers["range"][6:].split("-")[0]) for seen in proxy.seen if "a/large" in seen.target]
        assert after_bytes in {start % (256 * KIB) for start in ranges[1:]} | {0}


async def test_more_cuts_than_attempts_are_survived_as_long_as_bytes_arrive(
    server: S3Server, bucket: str, datablock: Datablock, tmp_path: Path
) -> None:
    async with FaultProxy(server.endpoint_url) as proxy:
        proxy.rules.append(Rule(CutReply(30_000), target="a/large", times=20))
        async with staged(server, datablock, tmp_path / "d_1.tar", url=proxy.url) as stage:
            await stage.move(bucket).run()
            stage.sink.commit()
    assert read_tar(tmp_path / "d_1.tar") == FILES


async def test_throttling_is_waited_out_and_refusals_end_the_move_at_once(
    server: S3Server, bucket: str, datablock: Datablock, tmp_path: Path
) -> None:
    async with FaultProxy(server.endpoint_url) as proxy:
        proxy.rules.append(Rule(Answer(503, "SlowDown"), target="b/00", times=4))
        async with staged(server, datablock, tmp_path / "d_1.tar", url=proxy.url) as stage:
            await stage.move(bucket).run()
        proxy.rules.append(Rule(Answer(403, "AccessDenied"), target="a/large", times=100))
        proxy.seen.clear()
        async with staged(server, datablock, tmp_path / "d_2.tar", url=proxy.url) as stage:
            with pytest.raises(ObjectAccessError):
                await stage.move(bucket).run()
        assert len([seen for seen in proxy.seen if "a/large" in seen.target]) <= 4, "at most one for each window"


async def test_a_changed_object_fails_the_move(
    server: S3Server, bucket: str, datablock: Datablock, tmp_path: Path
) -> None:
    first, *others = datablock.members
    other = type(first)(first.path, first.size_bytes, "0" * 32, 5, first.offset_bytes, first.header_bytes)
    changed = Datablock(DATASET, 1, (other, *others), datablock.payload_bytes, datablock.size_bytes)
    async with staged(server, changed, tmp_path / "d_1.tar") as stage:
        with pytest.raises(ObjectChangedError):
            await stage.move(bucket).run()


async def test_a_failed_write_is_not_tried_again_and_what_was_durable_is_recorded(
    server: S3Server, bucket: str, datablock: Datablock, tmp_path: Path
) -> None:
    async with staged(server, datablock, tmp_path / "d_1.tar") as stage:
        stage.sink.fails_after_bytes = 900_000
        move = stage.move(bucket)
        with pytest.raises(LtsError, match="refused by a test"):
            await move.run()
        assert stage.recorded
        assert stage.sink.events[-2:] == ["checkpoint", "record"]
        for key, digest in stage.recorded.items():
            assert digests()[key] == digest


async def test_a_cancelled_move_leaves_what_the_next_one_goes_on_from(
    server: S3Server, bucket: str, datablock: Datablock, tmp_path: Path
) -> None:
    final = tmp_path / "d_1.tar"
    async with FaultProxy(server.endpoint_url) as proxy:
        proxy.rules.append(Rule(StallReply(10), target="z/last", times=100))
        proxy.rules.append(Rule(StallReply(10), target="b/039", times=100))
        async with staged(server, datablock, final, url=proxy.url) as stage:
            move = stage.move(bucket)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(move.run)
                with anyio.fail_after(20):
                    while (0, 3) not in move.digests:  # noqa: ASYNC110 - the move tells nobody
                        await anyio.sleep(0.005)
                tasks.cancel_scope.cancel()
            first = dict(stage.recorded)
            assert first
            assert first.items() <= digests().items()
            assert set(first) == set(move.digests)
    async with staged(server, datablock, final, durable=first) as stage:
        move = stage.move(bucket)
        assert stage.sink.sink.resumed
        await move.run()
        assert move.digests == digests()
        assert not set(stage.recorded) & set(first), "nothing durable is moved again"
        assert move.counters.received_bytes + move.counters.reused_bytes == datablock.payload_bytes
        stage.sink.commit()
    assert final.read_bytes() == datablock_bytes(datablock, FILES)


async def test_two_moves_share_the_smallest_pool_without_waiting_for_each_other_for_ever(
    server: S3Server, bucket: str, datablock: Datablock, tmp_path: Path
) -> None:
    async with staged(server, datablock, tmp_path / "d_1.tar", pool_bytes=1 << 20) as stage:
        second = Stage(datablock, tmp_path / "d_2.tar", stage.lanes, {})
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(stage.move(bucket).run)
                tasks.start_soon(second.move(bucket).run)
        assert stage.lanes.pool.statistics().peak_bytes <= 1 << 20
        second.sink.commit()
        second.sink.close()
    assert read_tar(tmp_path / "d_2.tar") == FILES
