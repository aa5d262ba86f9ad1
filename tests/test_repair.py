"""A damaged datablock is rebuilt as its manifest proves it, or nothing changes; what is there is listed beside it."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from mover.engine import Engine, EngineConfig
from mover.errors import DatasetNotFoundError, ObjectChangedError, ObjectMissingError
from mover.model import archive_id, raw_object_key
from mover.verification import DamagedDatasetError
from tests.datasets import DATASET, archive, make_config, random_bytes, upload
from tests.engines import datablock_file, expect_same_files, flip
from tests.servers import BucketFactory, S3Server, object_keys, put_objects, s3_client

pytestmark = pytest.mark.anyio

FILES = {f"f{number}": random_bytes(100_000 + number, number) for number in range(6)}


@pytest.fixture
async def config(tmp_path: Path, s3_server: S3Server, bucket: BucketFactory) -> EngineConfig:
    """Two datablocks on the LTS, the first one with a flipped bit."""
    config = make_config(tmp_path, s3_server, bucket, target_bytes=300_100)
    await anyio.to_thread.run_sync(upload, s3_server, config.buckets.landing_zone, FILES)
    await archive(config)
    flip(datablock_file(config.lts_root), 5_000)
    return config


def remove_source(server: S3Server, config: EngineConfig) -> None:
    with s3_client(server) as client:
        for key in object_keys(server, config.buckets.landing_zone):
            client.delete_object(Bucket=config.buckets.landing_zone, Key=key)


async def test_a_datablock_is_rebuilt_from_the_landing_zone(config: EngineConfig) -> None:
    before = datablock_file(config.lts_root).with_suffix(".tar.manifest.json").read_bytes()
    async with Engine.open(config) as engine:
        with pytest.raises(DamagedDatasetError, match="--datablock N"):
            await engine.verify(DATASET)
        report = await engine.repair(DATASET, 1)
        await engine.verify(DATASET)
    assert (report.number, report.evidence) == (1, "read-back")
    assert datablock_file(config.lts_root).with_suffix(".tar.manifest.json").read_bytes() == before
    expect_same_files(config.lts_root, FILES)


async def test_a_datablock_is_rebuilt_from_its_retrieval_copy_when_the_source_is_gone(
    config: EngineConfig, s3_server: S3Server
) -> None:
    flip(datablock_file(config.lts_root), 5_000)  # whole again, for the copy
    async with Engine.open(config) as engine:
        await engine.retrieve(DATASET)
        remove_source(s3_server, config)
        datablock_file(config.lts_root).unlink()
        await engine.repair(DATASET, 1)
        await engine.verify(DATASET)
    expect_same_files(config.lts_root, FILES)


async def test_a_damaged_retrieval_copy_gives_way_to_the_landing_zone(
    config: EngineConfig, s3_server: S3Server
) -> None:
    damaged = datablock_file(config.lts_root).read_bytes()
    put_objects(s3_server, config.buckets.retrieval, {archive_id(DATASET, 1): damaged})
    async with Engine.open(config) as engine:
        await engine.repair(DATASET, 1)
        await engine.verify(DATASET)
    expect_same_files(config.lts_root, FILES)


@pytest.mark.parametrize("other", [None, b"x" * 100_000])
async def test_nothing_changes_when_there_is_nothing_right_to_rebuild_from(
    config: EngineConfig, s3_server: S3Server, other: bytes | None
) -> None:
    before = datablock_file(config.lts_root).read_bytes()
    remove_source(s3_server, config)
    if other is not None:
        put_objects(s3_server, config.buckets.landing_zone, {raw_object_key(DATASET, "f0"): other})
    async with Engine.open(config) as engine:
        with pytest.raises((ObjectMissingError, ObjectChangedError)):
            await engine.repair(DATASET, 1)
    assert datablock_file(config.lts_root).read_bytes() == before
    assert not list(datablock_file(config.lts_root).parent.glob(".*.part"))


async def test_unknown_datablocks_and_datasets_are_named(config: EngineConfig) -> None:
    async with Engine.open(config) as engine:
        with pytest.raises(DatasetNotFoundError, match="datablock 7"):
            await engine.repair(DATASET, 7)
        with pytest.raises(DatasetNotFoundError, match="nothing"):
            [item async for item in engine.datasets("no/such")]


async def test_datasets_are_listed_beside_a_damaged_manifest(config: EngineConfig) -> None:
    async with Engine.open(config) as engine:
        [whole] = [item async for item in engine.datasets()]
        datablock_file(config.lts_root, 2).with_suffix(".tar.manifest.json").write_text("{}")
        [damaged] = [item async for item in engine.datasets(DATASET)]
    assert (whole.datablocks, whole.datablock_count, whole.file_count, whole.problem) == (2, 2, 6, "")
    assert (damaged.datablocks, damaged.datablock_count) == (1, 2)
    assert datablock_file(config.lts_root, 2).name in damaged.problem
