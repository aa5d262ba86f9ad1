"""The way back: what appears in the retrieval bucket was proved, and nothing else does."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import anyio
import anyio.to_thread
import pytest

from mover.engine import EngineConfig
from mover.errors import (
    ConfigError,
    DatasetNotFoundError,
    DigestMismatchError,
    IncompleteDatasetError,
    ObjectAccessError,
    UnknownFileError,
)
from mover.model import Progress, archive_id, raw_files_prefix
from mover.policies.parts import MAX_PARTS, MIN_PART_BYTES, part_bytes, require_memory
from tests.datasets import (
    DATASET,
    archive,
    make_config,
    named_for,
    open_engine,
    random_bytes,
    unfinished_uploads,
    upload,
)
from tests.faults import Answer, FaultProxy, Rule, StallRequest, TrickleReply
from tests.servers import BucketFactory, S3Server, object_keys, put_objects, s3_client

pytestmark = pytest.mark.anyio

FILES = {
    "a/empty": b"",
    "a/one": b"1",
    "ab": b"no folder",
    "large": random_bytes((17 << 20) + 5, 1),
    **{f"many/{index:03}": random_bytes(5_000 + index, index) for index in range(80)},
    "odd \"'é e\u0301\n+&=%#?": b"odd",
    "z": b"last",
}
PREFIX = raw_files_prefix(DATASET)


async def wait_until(condition: Callable[[], bool]) -> None:
    while not await anyio.to_thread.run_sync(condition):
        pass


@pytest.fixture
def config(tmp_path: Path, s3_server: S3Server, bucket: BucketFactory) -> EngineConfig:
    made = make_config(tmp_path, s3_server, bucket, target_bytes=10 << 20, buffer_bytes=32 << 20)
    upload(s3_server, made.buckets.landing_zone, named_for(s3_server, FILES))
    return made


def retrieved(server: S3Server, config: EngineConfig) -> dict[str, bytes]:
    bucket = config.buckets.retrieval
    with s3_client(server) as client:
        keys = [key for key in object_keys(server, bucket) if not key.endswith(".sha256")]
        return {key: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


def datablocks(config: EngineConfig) -> dict[str, bytes]:
    found = config.lts_root.rglob("*.tar")
    return {path.relative_to(config.lts_root).as_posix(): path.read_bytes() for path in found}


def damage(config: EngineConfig, number: int, offset_bytes: int) -> None:
    path = config.lts_root / archive_id(DATASET, number)
    with path.open("r+b") as file:
        file.seek(offset_bytes)
        byte = file.read(1)
        file.seek(offset_bytes)
        file.write(bytes([byte[0] ^ 1]))


async def test_datablocks_come_back_byte_for_byte_with_links_and_checksums(
    config: EngineConfig, s3_server: S3Server
) -> None:
    await archive(config)
    events: list[Progress] = []
    async with open_engine(config, events.append) as engine:
        report = await engine.retrieve(DATASET)
        limit = engine.statistics().limits[3]
        peak_bytes = engine.statistics().buffers.peak_bytes
    expected = datablocks(config)
    assert len(expected) > 1
    assert retrieved(s3_server, config) == expected
    assert [item.key for item in report.objects] == [archive_id(DATASET, n + 1) for n in range(len(expected))]
    assert report.counters.lts_read_bytes == report.counters.retrieval_written_bytes == sum(map(len, expected.values()))
    assert (limit.name, limit.peak) == ("LTS_TO_RETRIEVAL_LIMIT", 1)
    assert peak_bytes <= config.buffer_bytes
    assert {(event.stage, event.state) for event in events} >= {("recall", "finished"), ("retrieve", "finished")}
    opener = build_opener(ProxyHandler({}))
    for item in report.objects:
        with await anyio.to_thread.run_sync(opener.open, item.url) as reply:
            body = await anyio.to_thread.run_sync(reply.read)
        assert hashlib.sha256(body).hexdigest() == item.sha256
        assert (body, item.outcome) == (expected[item.key], "written")


async def test_what_is_there_already_is_adopted_with_its_checksum_and_not_read_again(config: EngineConfig) -> None:
    await archive(config)
    async with open_engine(config) as engine:
        first = await engine.retrieve(DATASET)
        second = await engine.retrieve(DATASET)
    assert {item.outcome for item in second.objects} == {"adopted"}
    assert second.counters.lts_read_bytes == second.counters.retrieval_written_bytes == 0
    assert [item.sha256 for item in second.objects] == [item.sha256 for item in first.objects]


async def test_an_object_that_is_another_one_is_replaced(config: EngineConfig, s3_server: S3Server) -> None:
    await archive(config)
    key = archive_id(DATASET, 1)
    put_objects(s3_server, config.buckets.retrieval, {key: bytes(len(datablocks(config)[key]))})
    async with open_engine(config) as engine:
        await engine.retrieve(DATASET)
    assert retrieved(s3_server, config) == datablocks(config)


@pytest.mark.parametrize("as_files", [False, True])
@pytest.mark.parametrize("last_datablock", [False, True])
@pytest.mark.slow
async def test_damaged_bytes_on_the_lts_never_appear(
    config: EngineConfig, s3_server: S3Server, *, as_files: bool, last_datablock: bool
) -> None:
    await archive(config)
    async with open_engine(config) as engine:
        members = [item async for item in engine.members(DATASET)]
        number, member = members[-1] if last_datablock else next(item for item in members if item[1].path == "large")
        damage(config, number, member.offset_bytes + member.header_bytes + member.size_bytes - 1)
        with pytest.raises(DigestMismatchError, match="the LTS"):
            await engine.retrieve(DATASET, form="files" if as_files else "datablocks")
    key = PREFIX + member.path if as_files else archive_id(DATASET, number)
    assert key not in object_keys(s3_server, config.buckets.retrieval)
    assert unfinished_uploads(s3_server, config.buckets.retrieval) == []


async def test_a_damaged_tar_header_never_appears(config: EngineConfig, s3_server: S3Server) -> None:
    await archive(config)
    damage(config, 1, 3)
    async with open_engine(config) as engine:
        with pytest.raises(DigestMismatchError, match="tar structure"):
            await engine.retrieve(DATASET)
    assert archive_id(DATASET, 1) not in object_keys(s3_server, config.buckets.retrieval)


@pytest.mark.slow
async def test_members_come_back_as_objects_under_their_names(config: EngineConfig, s3_server: S3Server) -> None:
    await archive(config)
    async with open_engine(config) as engine:
        report = await engine.retrieve(DATASET, form="files")
        again = await engine.retrieve(DATASET, form="files")
    files = named_for(s3_server, FILES)
    assert retrieved(s3_server, config) == {PREFIX + path: body for path, body in files.items()}
    assert {item.key: item.sha256 for item in report.objects} == {
        PREFIX + path: hashlib.sha256(body).hexdigest() for path, body in files.items()
    }
    assert {item.outcome for item in again.objects} == {"adopted"}
    assert again.counters.lts_read_bytes == 0


async def test_single_files_are_read_at_their_offset_and_nothing_else(
    config: EngineConfig, s3_server: S3Server
) -> None:
    await archive(config)
    async with open_engine(config) as engine:
        report = await engine.retrieve(DATASET, files=["large", "z"])
    assert report.form == "files"
    assert report.counters.lts_read_bytes == len(FILES["large"]) + len(FILES["z"])
    assert retrieved(s3_server, config) == {PREFIX + path: FILES[path] for path in ("large", "z")}


@pytest.mark.slow
async def test_a_folder_names_all_that_is_below_it(config: EngineConfig) -> None:
    await archive(config)
    async with open_engine(config) as engine:
        report = await engine.retrieve(DATASET, files=["a/", "many"])
    paths = {item.key.removeprefix(PREFIX) for item in report.objects}
    assert paths == {path for path in FILES if path.startswith(("a/", "many/"))}


async def test_unknown_files_are_all_named_before_anything_is_read(config: EngineConfig, s3_server: S3Server) -> None:
    await archive(config)
    for path in config.lts_root.rglob("*.tar"):
        path.unlink()  # reading would fail
    async with open_engine(config) as engine:
        with pytest.raises(UnknownFileError) as caught:
            await engine.retrieve(DATASET, files=["large", "lar", "many/none/"])
    assert caught.value.paths == ("lar", "many/none/")
    assert object_keys(s3_server, config.buckets.retrieval) == []


@pytest.mark.slow
async def test_a_dataset_that_is_not_there_or_not_complete_is_refused(config: EngineConfig) -> None:
    async with open_engine(config) as engine:
        with pytest.raises(DatasetNotFoundError):
            await engine.retrieve(DATASET)
        await engine.archive(DATASET)
        (config.lts_root / f"{archive_id(DATASET, 1)}.manifest.json").unlink()
        with pytest.raises(IncompleteDatasetError, match="number 1 has no manifest") as caught:
            await engine.retrieve(DATASET)
    assert caught.value.missing == (1,)


@pytest.mark.slow
async def test_a_failed_upload_leaves_nothing_behind(config: EngineConfig, s3_server: S3Server, tmp_path: Path) -> None:
    await archive(config)
    async with FaultProxy(s3_server.endpoint_url) as proxy:
        through = make_config(tmp_path, s3_server, config.buckets, endpoint_url=proxy.url)
        proxy.rules.append(Rule(Answer(403, "AccessDenied"), method="PUT", target="partNumber=2", times=math.inf))
        async with open_engine(through) as engine:
            with pytest.raises(ObjectAccessError):
                await engine.retrieve(DATASET, files=["large"])
        assert any("partNumber=1" in item.target for item in proxy.seen)
    assert unfinished_uploads(s3_server, config.buckets.retrieval) == []
    assert object_keys(s3_server, config.buckets.retrieval) == []


@pytest.mark.parametrize(
    "rule",
    [
        Rule(StallRequest(0), target="partNumber=2"),
        Rule(TrickleReply(1, 1.0), target="uploads"),  # cancelled when the server has begun and nobody knows it yet
    ],
    ids=["sending", "beginning"],
)
@pytest.mark.slow
async def test_a_cancelled_retrieval_leaves_nothing_behind(
    config: EngineConfig, s3_server: S3Server, tmp_path: Path, rule: Rule
) -> None:
    await archive(config)
    async with FaultProxy(s3_server.endpoint_url) as proxy:
        through = make_config(tmp_path, s3_server, config.buckets, endpoint_url=proxy.url)
        proxy.rules.append(replace(rule))
        async with open_engine(through) as engine, anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: engine.retrieve(DATASET, files=["large"]))
            await proxy.wait_until(lambda: any(item.fault for item in proxy.seen))
            await wait_until(lambda: bool(unfinished_uploads(s3_server, config.buckets.retrieval)))
            tasks.cancel_scope.cancel()
    assert unfinished_uploads(s3_server, config.buckets.retrieval) == []
    assert object_keys(s3_server, config.buckets.retrieval) == []


@pytest.mark.parametrize("size_bytes", [1, 8 << 20, 78 << 30, 79 << 30, 2 << 40, 5 << 40])
def test_parts_are_as_many_as_s3_allows(size_bytes: int) -> None:
    assert part_bytes(size_bytes) >= MIN_PART_BYTES
    assert -(-size_bytes // part_bytes(size_bytes)) <= MAX_PARTS


def test_too_little_memory_for_a_part_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="MOVER_BUFFER_MB"):
        require_memory(part_bytes(5 << 40), 16 << 20)
