"""Archiving datasets from real servers: adopted, resumed, refused, mended, side by side within the limits."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import msgspec
import pytest

from mover.engine import Engine, EngineConfig
from mover.errors import (
    DatasetBusyError,
    DatasetNotFoundError,
    DigestMismatchError,
    ExitCode,
    LtsError,
    NotEnoughSpaceError,
    SourceDiffersError,
)
from mover.model import Manifest, Progress, Stage
from mover.streams.durable import rename_file
from mover.verification import DamagedDatasetError
from tests.datasets import DATASET, make_config, random_bytes, upload
from tests.engines import RecordingCatalogue, datablock_file, expect_same_files, flip, small_windows
from tests.faults import AlterReply, CorruptReply, FaultProxy, Rule, StallReply
from tests.lts_mounts import small_mount
from tests.servers import BucketFactory, S3Server, fresh_bucket, object_keys, s3_client

pytestmark = pytest.mark.anyio

KIB = 1 << 10
TARGET_BYTES = 100 * KIB
FILES = {
    "a/empty": b"",
    "a/larger than the target": random_bytes(300 * KIB, 1),
    **{f"b/{number:02d}": random_bytes(9 * KIB + number, number) for number in range(20)},
    "caf\u00e9 & co/" + "n" * 150: random_bytes(1000, 2),
}


@pytest.fixture
def config(moto_server: S3Server, tmp_path: Path) -> EngineConfig:
    """An engine's configuration with the dataset uploaded; buckets that nobody else uses."""
    return prepared(moto_server, tmp_path)


def prepared(server: S3Server, tmp_path: Path) -> EngineConfig:
    names = iter(f"archive-{os.getpid()}-{abs(hash(tmp_path))}-{kind}" for kind in "abc")

    def factory() -> str:
        name = next(names)
        with s3_client(server) as client:
            client.create_bucket(Bucket=name)
        return name

    config = make_config(tmp_path, server, factory, target_bytes=TARGET_BYTES)
    upload(server, config.buckets.landing_zone, FILES)
    return config


@asynccontextmanager
async def proxied(config: EngineConfig) -> AsyncIterator[tuple[EngineConfig, FaultProxy]]:
    """The same configuration with a proxy in front of the server."""
    async with FaultProxy(config.s3.endpoint_url) as proxy:
        yield msgspec.structs.replace(config, s3=msgspec.structs.replace(config.s3, endpoint_url=proxy.url)), proxy


def manifest(config: EngineConfig, number: int) -> Manifest:
    path = datablock_file(config.lts_root, number)
    return msgspec.json.decode(path.with_name(path.name + ".manifest.json").read_bytes(), type=Manifest)


def gets(proxy: FaultProxy) -> list[str]:
    """Targets of the objects that were fetched."""
    return [seen.target for seen in proxy.seen if seen.method == "GET" and "raw_files/" in seen.target.split("?")[0]]


async def test_a_dataset_becomes_datablocks_that_hold_exactly_its_files(
    s3_server: S3Server, bucket: BucketFactory, tmp_path: Path
) -> None:
    config = make_config(tmp_path, s3_server, bucket, target_bytes=TARGET_BYTES)
    upload(s3_server, config.buckets.landing_zone, FILES)
    async with Engine.open(config) as engine:
        plan = await engine.plan(DATASET)
        report = await engine.archive(DATASET)
    expect_same_files(config.lts_root, FILES)
    assert len(report.datablocks) == len(plan.datablocks) > 3
    assert report.size_bytes == plan.size_bytes
    assert [block.outcome for block in report.datablocks] == ["written"] * len(plan.datablocks)
    assert report.counters.landing_zone_read_bytes == report.counters.lts_written_bytes - (
        plan.size_bytes - plan.payload_bytes
    )
    assert report.counters.lts_read_bytes == plan.size_bytes
    assert manifest(config, 1).evidence[0].digest == report.datablocks[0].digest
    assert len(object_keys(s3_server, config.buckets.landing_zone)) == len(FILES), "the source stays unless asked"
    assert not (config.scratch_folder / "journal" / "20.500.11935%2Fa-dataset").exists()


async def test_an_archived_dataset_is_adopted_without_fetching_anything(config: EngineConfig) -> None:
    async with proxied(config) as (through, proxy), Engine.open(through) as engine:
        first = await engine.archive(DATASET)
        before = [path.stat() for path in sorted(config.lts_root.rglob("*.tar"))]
        proxy.seen.clear()
        second = await engine.archive(DATASET)
        assert gets(proxy) == []
    assert {block.outcome for block in second.datablocks} == {"adopted"}
    assert [block.digest for block in second.datablocks] == [block.digest for block in first.datablocks]
    after = [path.stat() for path in sorted(config.lts_root.rglob("*.tar"))]
    assert [(stat.st_ino, stat.st_mtime_ns) for stat in before] == [(stat.st_ino, stat.st_mtime_ns) for stat in after]


async def test_a_released_dataset_is_adopted_with_its_source_gone(config: EngineConfig, moto_server: S3Server) -> None:
    async with Engine.open(config) as engine:
        report = await engine.archive(DATASET, release_source=True)
        assert report.release is not None
        assert (report.release.deleted, report.release.kept) == (len(FILES), ())
        assert object_keys(moto_server, config.buckets.landing_zone) == []
        again = await engine.archive(DATASET, release_source=True)
    assert {block.outcome for block in again.datablocks} == {"adopted"}
    assert again.counters.lts_read_bytes == 0


async def test_a_verification_looks_at_all_datablocks_and_says_of_each_damaged_one_how_to_rebuild_it(
    config: EngineConfig,
) -> None:
    config = msgspec.structs.replace(config, target_bytes=100_000)
    async with Engine.open(config) as engine:
        count = len((await engine.archive(DATASET)).datablocks)
        assert count >= 3
        flip(datablock_file(config.lts_root, 1), 700)
        datablock_file(config.lts_root, count).unlink()
        events: list[Progress] = []
        async with Engine.open(config, tell=events.append) as watched:
            with pytest.raises(DamagedDatasetError, match=f"2 of {count} datablock.*damaged: 1, {count}$") as caught:
                await watched.verify(DATASET)
    assert set(caught.value.damage) == {1, count}
    assert "is gone" in str(caught.value)
    assert caught.value.exit_code == ExitCode.INTEGRITY
    looked_at = {event.datablock for event in events if event.stage is Stage.VERIFY and event.state == "finished"}
    assert set(range(2, count)) <= looked_at


async def test_a_source_is_released_only_after_what_an_earlier_run_committed_was_read_back_once_more(
    config: EngineConfig, moto_server: S3Server
) -> None:
    async with Engine.open(config) as engine:
        await engine.archive(DATASET)
        flip(datablock_file(config.lts_root, 1), 700)  # the storage loses a bit while the source waits for its release
        with pytest.raises(DigestMismatchError):
            await engine.archive(DATASET, release_source=True)
        assert len(object_keys(moto_server, config.buckets.landing_zone)) == len(FILES)
        await engine.repair(DATASET, 1)
        report = await engine.archive(DATASET, release_source=True)
    assert report.release is not None
    assert report.release.deleted == len(FILES)
    assert report.counters.lts_read_bytes == report.size_bytes


async def test_an_archived_dataset_whose_source_differs_is_refused_and_nothing_is_overwritten(
    config: EngineConfig, moto_server: S3Server
) -> None:
    async with Engine.open(config) as engine:
        await engine.archive(DATASET)
        before = {path: path.read_bytes() for path in config.lts_root.rglob("*_*.tar*") if path.is_file()}
        upload(moto_server, config.buckets.landing_zone, {"b/new": b"x", "b/00": b"changed"})
        with pytest.raises(SourceDiffersError) as caught:
            await engine.archive(DATASET, release_source=True)
    assert (caught.value.added, caught.value.changed) == (("b/new",), ("b/00",))
    assert {path: path.read_bytes() for path in before} == before
    assert len(object_keys(moto_server, config.buckets.landing_zone)) == len(FILES) + 1


async def test_an_unknown_dataset_leaves_no_trace(config: EngineConfig) -> None:
    async with Engine.open(config) as engine:
        with pytest.raises(DatasetNotFoundError):
            await engine.archive("20.500.11935/unknown")
    assert list(config.lts_root.rglob("*unknown*")) == []


async def test_a_failed_run_goes_on_under_the_target_size_that_it_began_with(config: EngineConfig) -> None:
    async with proxied(config) as (broken, proxy):
        proxy.rules.append(Rule(StallReply(0), target="b/15", times=100))
        one_by_one = msgspec.structs.replace(broken, move_to_lts_limit=1)
        async with Engine.open(one_by_one) as engine, anyio.create_task_group() as tasks:
            tasks.start_soon(engine.archive, DATASET)
            with anyio.fail_after(20):
                while not datablock_file(config.lts_root, 3).with_suffix(".tar.manifest.json").exists():  # noqa: ASYNC110 - a file
                    await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()
        manifests = config.lts_root.rglob("*.manifest.json")
        done = {int(path.name.removesuffix(".tar.manifest.json").rpartition("_")[2]) for path in manifests}
    async with proxied(msgspec.structs.replace(config, target_bytes=TARGET_BYTES * 3)) as (later, proxy):
        async with Engine.open(later) as engine:
            report = await engine.archive(DATASET)
        assert {block.number for block in report.datablocks if block.outcome == "adopted"} == done
        archived = {member.key for number in done for member in manifest(config, number).members}
        assert not [target for target in gets(proxy) if any(target.endswith(key) for key in archived)]
    assert {manifest(config, block.number).target_bytes for block in report.datablocks} == {TARGET_BYTES}
    expect_same_files(config.lts_root, FILES)


async def test_a_bit_that_flips_on_the_lts_is_found_and_only_its_window_is_fetched_again(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupt_after_commit(monkeypatch, "_1.tar", times=1)
    async with proxied(config) as (through, proxy):
        async with Engine.open(through) as engine:
            report = await engine.archive(DATASET)
        assert len(gets(proxy)) == len(FILES) + 1
    assert report.counters.lts_read_bytes == report.size_bytes + report.datablocks[0].size_bytes
    expect_same_files(config.lts_root, FILES)


async def test_an_lts_that_breaks_twice_fails_the_datablock_and_the_next_run_fetches_the_window_alone(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_windows(monkeypatch, window_bytes=64 * KIB, small_bytes=32 * KIB)
    with monkeypatch.context() as broken:
        corrupt_after_commit(broken, "_2.tar", times=2)
        async with Engine.open(config) as engine:
            with pytest.raises(DigestMismatchError, match="the side at fault: the LTS") as caught:
                await engine.archive(DATASET)
    assert caught.value.exit_code is ExitCode.INTEGRITY
    assert not datablock_file(config.lts_root, 2).with_suffix(".tar.manifest.json").exists()
    async with proxied(config) as (through, proxy):
        async with Engine.open(through) as engine:
            report = await engine.archive(DATASET)
        again = [seen.headers["range"] for seen in proxy.seen if "larger" in seen.target and seen.method == "GET"]
    assert again == [f"bytes=0-{64 * KIB - 1}"]
    assert report.datablocks[1].outcome == "resumed"
    expect_same_files(config.lts_root, FILES)


def corrupt_after_commit(monkeypatch: pytest.MonkeyPatch, suffix: str, times: int) -> None:
    """Turns a bit of a datablock's payload right after it got its final name."""
    left = [times]

    def rename(source: Path, target: Path, *, replace: bool) -> None:
        rename_file(source, target, replace=replace)
        if target.name.endswith(suffix) and left[0]:
            left[0] -= 1
            flip(target, 1024 if suffix == "_2.tar" else 5)

    monkeypatch.setattr("mover.streams.durable.rename_file", rename)


async def test_bytes_that_change_on_the_way_are_found_by_the_servers_own_md5_and_fetched_again(
    config: EngineConfig,
) -> None:
    async with proxied(config) as (through, proxy):
        proxy.rules.append(Rule(CorruptReply(500), target="b/03"))
        async with Engine.open(through) as engine:
            await engine.archive(DATASET)
        assert len([target for target in gets(proxy) if target.endswith("b/03")]) == 2
    expect_same_files(config.lts_root, FILES)


async def test_an_etag_that_is_no_md5_is_no_claim(config: EngineConfig) -> None:
    async with proxied(config) as (through, proxy):
        proxy.rules.append(Rule(CorruptReply(500), target="b/03", times=100))  # always: as if it were the object
        kms = AlterReply(add=(("x-amz-server-side-encryption", "aws:kms"),))
        proxy.rules.insert(0, Rule(kms, method="HEAD", times=100))
        async with Engine.open(through) as engine:
            report = await engine.archive(DATASET)
    claims = {m.path: m.checksum for block in report.datablocks for m in manifest(config, block.number).members}
    assert claims["b/03"] is None
    assert claims["b/04"] is not None


async def test_datablocks_are_verified_while_the_next_ones_move_and_the_limits_hold(
    moto_server: S3Server, config: EngineConfig
) -> None:
    upload(moto_server, config.buckets.landing_zone, FILES, "20.500.11935/second")
    running: set[tuple[Stage, str, int]] = set()
    together: set[frozenset[Stage]] = set()

    def tell(event: Progress) -> None:
        key = (event.stage, event.dataset_id, event.datablock)
        (running.add if event.state in {"started", "progress"} else running.discard)(key)
        together.add(frozenset(stage for stage, _, _ in running))

    async with Engine.open(config, tell=tell) as engine:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(engine.archive, DATASET)
            tasks.start_soon(engine.archive, "20.500.11935/second")
        limits = {limit.name: limit for limit in engine.statistics().limits}
    assert {name: limit.peak for name, limit in limits.items()} == {
        "LTS_FREE_LIMIT": 1,
        "MOVE_TO_LTS_LIMIT": 2,
        "VERIFY_LTS_LIMIT": 1,
        "LTS_TO_RETRIEVAL_LIMIT": 0,
    }
    assert any({Stage.MOVE, Stage.VERIFY} <= stages for stages in together)
    for dataset_id in (DATASET, "20.500.11935/second"):
        expect_same_files(config.lts_root, FILES, dataset_id)


async def test_a_raised_limit_counts_at_once_for_a_dataset_in_work(moto_server: S3Server, config: EngineConfig) -> None:
    many = {f"b/{number:02d}": random_bytes(90 * KIB, number) for number in range(12)}
    upload(moto_server, config.buckets.landing_zone, many, "20.500.11935/many")
    async with proxied(config) as (through, proxy):
        proxy.rules.append(Rule(StallReply(0), target="b/", times=1000))
        async with Engine.open(through) as engine, anyio.create_task_group() as tasks:
            tasks.start_soon(engine.archive, "20.500.11935/many")
            moving = engine.statistics().limits[1]
            with anyio.fail_after(20):
                while len(moving.holders) < 2:
                    await anyio.sleep(0.01)
                    moving = engine.statistics().limits[1]
            engine.set_limits({"MOVE_TO_LTS_LIMIT": 7})
            with anyio.fail_after(20):
                while len(moving.holders) < 7:
                    await anyio.sleep(0.01)
                    moving = engine.statistics().limits[1]
            tasks.cancel_scope.cancel()


async def test_a_second_run_on_the_same_dataset_is_turned_away(config: EngineConfig) -> None:
    async with proxied(config) as (through, proxy):
        proxy.rules.append(Rule(StallReply(0), target="b/15", times=100))
        async with Engine.open(through) as engine, Engine.open(through) as other, anyio.create_task_group() as tasks:
            tasks.start_soon(engine.archive, DATASET)
            with anyio.fail_after(10):
                await proxy.wait_until(lambda: len(gets(proxy)) > 0)
            for rival in (engine, other):
                with pytest.raises(DatasetBusyError):
                    await rival.archive(DATASET)
            tasks.cancel_scope.cancel()


async def test_a_share_without_space_ends_with_its_own_exit_code(config: EngineConfig, tmp_path: Path) -> None:
    with small_mount(tmp_path / "full", "400k") as root:
        full = msgspec.structs.replace(config, lts_root=root, space_deadline_s=0.1)
        async with Engine.open(full) as engine:
            with pytest.raises(NotEnoughSpaceError) as caught:
                await engine.archive(DATASET)
    assert caught.value.exit_code is ExitCode.SPACE


async def test_a_catalogue_that_refuses_one_datablock_is_rolled_back_and_the_source_stays(
    config: EngineConfig, moto_server: S3Server
) -> None:
    catalogue = RecordingCatalogue(refuses=lambda manifest: manifest.number == 3)
    async with Engine.open(config, catalogue=catalogue) as engine:
        with pytest.raises(LtsError, match="refused by a test"):
            await engine.archive(DATASET, release_source=True)
    assert catalogue.registered == []
    assert catalogue.calls[:3] == [("register", 1), ("register", 2), ("register", 3)]
    assert len(object_keys(moto_server, config.buckets.landing_zone)) == len(FILES)
    willing = RecordingCatalogue()
    async with Engine.open(config, catalogue=willing) as engine:
        report = await engine.archive(DATASET, release_source=True)
    assert {block.outcome for block in report.datablocks} == {"adopted"}
    assert willing.registered == [block.number for block in report.datablocks]
    assert object_keys(moto_server, config.buckets.landing_zone) == []


async def test_a_manifest_whose_datablock_is_gone_or_cut_is_not_adopted(config: EngineConfig) -> None:
    async with Engine.open(config) as engine:
        await engine.archive(DATASET)
        path = datablock_file(config.lts_root)
        os.truncate(path, 10)
        with pytest.raises(Exception, match="size in bytes"):
            await engine.archive(DATASET)
        path.unlink()
        with pytest.raises(LtsError, match="repair"):
            await engine.archive(DATASET)


@pytest.mark.slow
@pytest.mark.rgw
@pytest.mark.timeout(600)
async def test_20_001_members_are_two_datablocks(rgw_server: S3Server, tmp_path: Path) -> None:

    with fresh_bucket(rgw_server) as landing, fresh_bucket(rgw_server) as one, fresh_bucket(rgw_server) as two:
        names = iter((landing, one, two))
        config = make_config(tmp_path, rgw_server, lambda: next(names))
        upload(rgw_server, landing, {f"{number:05d}": b"%d" % number for number in range(20_001)})
        async with Engine.open(config) as engine:
            report = await engine.archive(DATASET)
        assert [block.members for block in report.datablocks] == [20_000, 1]
        expect_same_files(config.lts_root, {f"{number:05d}": b"%d" % number for number in range(20_001)})
