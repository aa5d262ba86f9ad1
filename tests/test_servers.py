"""The fixtures themselves: the servers answer, buckets vanish, the loop guard catches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from blockbuster import BlockingError

import mover
from tests.servers import BucketFactory, S3Server, fresh_bucket, object_keys, put_objects, s3_client


def test_an_object_comes_back_from_every_s3_server(s3_server: S3Server, bucket: BucketFactory) -> None:
    name = bucket()
    etags = put_objects(s3_server, name, {"a/ä b+c": b"1234567890", "empty": b""})
    with s3_client(s3_server) as client:
        answer = client.get_object(Bucket=name, Key="a/ä b+c", Range="bytes=2-4", IfMatch=f'"{etags["a/ä b+c"]}"')
        assert answer["Body"].read() == b"345"
    assert object_keys(s3_server, name) == ["a/ä b+c", "empty"]


def test_a_bucket_is_gone_after_its_block_with_objects_and_unfinished_uploads(s3_server: S3Server) -> None:
    with fresh_bucket(s3_server) as name, s3_client(s3_server) as client:
        put_objects(s3_server, name, {f"k{i}": b"x" for i in range(20)})
        client.create_multipart_upload(Bucket=name, Key="unfinished")
    with s3_client(s3_server) as client:
        assert name not in {entry["Name"] for entry in client.list_buckets()["Buckets"]}


def test_rclone_serves_ranges(rclone_server: S3Server) -> None:
    with fresh_bucket(rclone_server) as name:
        put_objects(rclone_server, name, {"k": b"1234567890"})
        with s3_client(rclone_server) as client:
            assert client.get_object(Bucket=name, Key="k", Range="bytes=2-4")["Body"].read() == b"345"


_SAMPLE = """
import os
def sync(path):
    with open(path, "rb") as stream:
        return stream.read()
async def blocks(path):
    return sync(path)
async def syncs(descriptor):
    os.fsync(descriptor)
"""


def _sample() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(_SAMPLE, str(Path(mover.__file__).parent / "sample.py"), "exec"), names)  # noqa: S102 - as if it were there
    return names


@pytest.mark.anyio
async def test_a_coroutine_of_the_mover_that_blocks_fails_its_test() -> None:
    names = _sample()
    with pytest.raises(BlockingError):
        await names["blocks"](__file__)
    with pytest.raises(BlockingError):
        await names["syncs"](1)


@pytest.mark.anyio
async def test_a_test_may_call_blocking_parts_itself() -> None:
    assert _sample()["sync"](__file__)


def test_settings_of_the_shell_do_not_reach_tests() -> None:
    assert not [name for name in os.environ if name.startswith(("MOVER_", "MINIO_"))]
