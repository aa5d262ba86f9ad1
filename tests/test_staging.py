"""The detour over the staging bucket: the same bytes, resumable, and emptied only after the read-back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from mover.archive import plan_source
from mover.datablock import from_landing_zone
from mover.engine import EngineConfig
from mover.errors import ConfigError, MoverError, ObjectAccessError
from mover.journal import DatablockJournal
from mover.model import WINDOW_BYTES, Datablock, DatasetPlan, archive_id
from mover.parts import Parts
from mover.plan import plan_dataset
from mover.policies.parts import MAX_PARTS, part_bytes
from mover.reports import ByteCounters
from mover.staging import _in_parts, stage_datablock
from mover.streams.hashing import digest_of
from mover.streams.interfaces import ByteRange
from mover.streams.units import Slice
from tests.datasets import DATASET, archive, listing, make_config, make_parts, random_bytes, unfinished_uploads, upload
from tests.faults import Answer, FaultProxy, Rule, TrickleReply
from tests.servers import BucketFactory, S3Server, object_keys, s3_client

pytestmark = pytest.mark.anyio

FILES = {
    "a/empty": b"",
    "a/one": b"1",
    **{f"many/{index:03}": random_bytes(20_000 + index, index) for index in range(150)},
    "middle": random_bytes(5 << 20, 1),
    "other": random_bytes(9 << 20, 2),
    "third": random_bytes((8 << 20) + 1, 3),
}
WINDOWS = random_bytes(WINDOW_BYTES + (3 << 20) + 1, 4)
KEY = archive_id(DATASET, 1)


@pytest.fixture
def config(tmp_path: Path, s3_server: S3Server, bucket: BucketFactory) -> EngineConfig:
    made = make_config(tmp_path, s3_server, bucket, staging=True)
    upload(s3_server, made.buckets.landing_zone, FILES)
    return made


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[DatablockJournal]:
    with DatablockJournal(tmp_path / "journal.jsonl") as opened:
        yield opened


async def stage(parts: Parts, journal: DatablockJournal, plan: DatasetPlan | None = None) -> ByteCounters:
    plan = plan or await plan_source(parts, DATASET)
    datablock: Datablock = plan.datablocks[0]
    counters = ByteCounters()
    landing_zone = from_landing_zone(parts.buckets.landing_zone, DATASET)
    locate, digests = await stage_datablock(parts, plan, datablock, journal, landing_zone, counters)
    first = datablock.members[1]
    assert locate(first, 0, 1) == ByteRange(
        parts.buckets.staging,
        KEY,
        (await parts.store.head(parts.buckets.staging, KEY)).etag,
        datablock.size_bytes,
        first.payload_offset_bytes,
        first.payload_offset_bytes + 1,
    )
    expected = {
        (index, window): digest_of(
            (FILES | {"windows": WINDOWS})[member.path][window * WINDOW_BYTES : (window + 1) * WINDOW_BYTES]
        )
        for index, member in enumerate(datablock.members)
        for window in range(max(1, math.ceil(member.size_bytes / WINDOW_BYTES)))
    }
    assert digests == expected
    return counters


def staged(server: S3Server, config: EngineConfig) -> bytes:
    with s3_client(server) as client:
        return client.get_object(Bucket=config.buckets.staging, Key=KEY)["Body"].read()


def on_the_lts(config: EngineConfig) -> bytes:
    return (config.lts_root / KEY).read_bytes()


@pytest.mark.slow
async def test_a_staged_object_is_the_tar_file_byte_for_byte(
    config: EngineConfig, s3_server: S3Server, journal: DatablockJournal
) -> None:
    upload(s3_server, config.buckets.landing_zone, {"windows": WINDOWS})
    await archive(config)
    async with make_parts(config) as parts:
        counters = await stage(parts, journal)
    assert staged(s3_server, config) == on_the_lts(config)
    assert counters.landing_zone_read_bytes == sum(map(len, FILES.values())) + len(WINDOWS)
    assert counters.staging_written_bytes == len(on_the_lts(config))


@pytest.mark.slow
async def test_archiving_over_staging_reads_the_source_once_and_leaves_the_bucket_empty(
    config: EngineConfig, s3_server: S3Server, tmp_path: Path
) -> None:
    report = await archive(config)
    payload_bytes = sum(map(len, FILES.values()))
    assert report.counters.landing_zone_read_bytes == report.counters.staging_read_bytes == payload_bytes
    assert object_keys(s3_server, config.buckets.staging) == []
    assert unfinished_uploads(s3_server, config.buckets.staging) == []
    direct = tmp_path / "direct"
    direct.mkdir()
    other = make_config(direct, s3_server, config.buckets)
    await archive(other)
    assert on_the_lts(other) == on_the_lts(config)


@pytest.mark.slow
async def test_an_interrupted_staging_fetches_only_the_parts_that_are_missing(
    config: EngineConfig, s3_server: S3Server, journal: DatablockJournal, tmp_path: Path
) -> None:
    async with FaultProxy(s3_server.endpoint_url) as proxy:
        broken = make_config(
            tmp_path, s3_server, config.buckets, endpoint_url=proxy.url, staging=True, buffer_bytes=18 << 20
        )
        proxy.rules.append(Rule(Answer(403, "AccessDenied"), method="PUT", target="partNumber=3", times=math.inf))
        async with make_parts(broken) as parts:
            with pytest.raises(ObjectAccessError):
                await stage(parts, journal)
    done = len(journal.state.parts)
    assert done >= 1  # the memory holds one part at a time
    async with make_parts(config) as parts:
        plan = await plan_source(parts, DATASET)
        missing = [part for part in _in_parts(plan.datablocks[0]) if part.number not in journal.state.parts]
        assert done + len(missing) == len(list(_in_parts(plan.datablocks[0])))
        counters = await stage(parts, journal)
    assert counters.landing_zone_read_bytes == sum(unit.payload_bytes for part in missing for unit in part.units)
    assert counters.staging_written_bytes == sum(part.size_bytes for part in missing)
    await archive(make_config(tmp_path, s3_server, config.buckets))
    assert staged(s3_server, config) == on_the_lts(config)


@pytest.mark.slow
async def test_parts_that_the_bucket_lost_are_uploaded_again(
    config: EngineConfig, s3_server: S3Server, journal: DatablockJournal, tmp_path: Path
) -> None:
    async with FaultProxy(s3_server.endpoint_url) as proxy:
        broken = make_config(tmp_path, s3_server, config.buckets, endpoint_url=proxy.url, staging=True)
        proxy.rules.append(Rule(Answer(403, "AccessDenied"), method="POST", target="uploadId=", times=math.inf))
        async with make_parts(broken) as parts:
            with pytest.raises(ObjectAccessError):
                await stage(parts, journal)
    with s3_client(s3_server) as client:
        client.abort_multipart_upload(Bucket=config.buckets.staging, Key=KEY, UploadId=journal.state.upload_id)
    async with make_parts(config) as parts:
        counters = await stage(parts, journal)
    assert counters.landing_zone_read_bytes == sum(map(len, FILES.values()))


async def test_a_finished_object_is_adopted_with_the_digests_of_the_journal(
    config: EngineConfig, journal: DatablockJournal
) -> None:
    async with make_parts(config) as parts:
        await stage(parts, journal)
        assert await stage(parts, journal) == ByteCounters()


@pytest.mark.slow
async def test_a_finished_object_without_its_digests_is_staged_again(
    config: EngineConfig, journal: DatablockJournal, tmp_path: Path
) -> None:
    async with make_parts(config) as parts:
        await stage(parts, journal)
        with DatablockJournal(tmp_path / "another.jsonl") as empty:
            counters = await stage(parts, empty)
    assert counters.landing_zone_read_bytes == sum(map(len, FILES.values()))


@pytest.mark.slow
async def test_an_object_that_somebody_else_put_there_is_replaced(
    config: EngineConfig, s3_server: S3Server, journal: DatablockJournal
) -> None:
    async with make_parts(config) as parts:
        await stage(parts, journal)
        right = staged(s3_server, config)
        with s3_client(s3_server) as client:
            client.put_object(Bucket=config.buckets.staging, Key=KEY, Body=bytes(len(right)))
        await stage(parts, journal)
    assert staged(s3_server, config) == right


async def test_a_journal_of_another_plan_starts_anew_and_drops_that_plan_s_upload(
    config: EngineConfig, s3_server: S3Server, journal: DatablockJournal
) -> None:
    async with make_parts(config) as parts:
        stale = await parts.store.begin(parts.buckets.staging, KEY, {})
        journal.begin("another plan", 1, 7)
        journal.begin_staging(stale.upload_id)
        await stage(parts, journal)
    assert unfinished_uploads(s3_server, config.buckets.staging) == []


async def test_staging_keeps_what_the_journal_knows_of_the_file(
    config: EngineConfig, journal: DatablockJournal
) -> None:
    async with make_parts(config) as parts:
        plan = await plan_source(parts, DATASET)
        journal.begin(plan.fingerprint, plan.datablocks[0].size_bytes, 7)
        journal.add_windows([(0, 0, "digest")])
        await stage(parts, journal, plan)
    assert journal.state.file_id == 7
    assert journal.state.windows == {(0, 0): "digest"}


async def test_too_little_memory_for_the_parts_is_refused_by_name(
    config: EngineConfig, s3_server: S3Server, journal: DatablockJournal, tmp_path: Path
) -> None:
    upload(s3_server, config.buckets.landing_zone, {"windows": WINDOWS})
    small = make_config(tmp_path, s3_server, config.buckets, buffer_bytes=64 << 20)
    async with make_parts(small) as parts:
        with pytest.raises(ConfigError, match="MOVER_BUFFER_MB"):
            await stage(parts, journal)
    assert object_keys(s3_server, config.buckets.staging) == []


async def test_a_failed_source_leaves_the_upload_for_the_next_run(
    config: EngineConfig, s3_server: S3Server, journal: DatablockJournal, tmp_path: Path
) -> None:
    async with FaultProxy(s3_server.endpoint_url) as proxy:
        broken = make_config(tmp_path, s3_server, config.buckets, endpoint_url=proxy.url, staging=True)
        proxy.rules.append(Rule(Answer(403, "AccessDenied"), method="GET", target="/third", times=math.inf))
        async with make_parts(broken) as parts:
            with pytest.raises(MoverError):
                await stage(parts, journal)
    assert unfinished_uploads(s3_server, config.buckets.staging) == [journal.state.upload_id]


async def test_a_cancelled_stage_knows_the_upload_that_it_was_beginning(
    config: EngineConfig, s3_server: S3Server, journal: DatablockJournal, tmp_path: Path
) -> None:
    async with FaultProxy(s3_server.endpoint_url) as proxy:
        slow = make_config(tmp_path, s3_server, config.buckets, endpoint_url=proxy.url, staging=True)
        proxy.rules.append(Rule(TrickleReply(1, 1.0), target="uploads"))
        async with make_parts(slow) as parts, anyio.create_task_group() as tasks:
            tasks.start_soon(stage, parts, journal)
            await proxy.wait_until(lambda: any(item.fault for item in proxy.seen))
            tasks.cancel_scope.cancel()
    assert unfinished_uploads(s3_server, config.buckets.staging) == [journal.state.upload_id]


@pytest.mark.parametrize("size_bytes", [70 << 20, 300 << 30, 2 << 40])
async def test_parts_are_whole_units_in_a_row_and_as_many_as_s3_allows(size_bytes: int) -> None:
    plan = await plan_dataset(DATASET, listing({"large": size_bytes, "small": 1}), target_bytes=1 << 40, where="")
    for datablock in plan.datablocks:
        offset_bytes = count = windows = 0
        for part in _in_parts(datablock):
            count += 1
            assert part.number == count
            assert part.offset_bytes == offset_bytes == part.units[0].offset_bytes
            assert part.size_bytes == sum(unit.size_bytes for unit in part.units)
            offset_bytes += part.size_bytes
            windows += sum(isinstance(unit, Slice) for unit in part.units)
            assert part.size_bytes >= part_bytes(datablock.size_bytes) or offset_bytes == datablock.size_bytes
        assert offset_bytes == datablock.size_bytes
        assert count <= MAX_PARTS
        assert windows == sum(
            math.ceil(member.size_bytes / WINDOW_BYTES) for member in datablock.members if member.size_bytes > 1
        )
