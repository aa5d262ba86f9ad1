"""Datasets for tests of the pipelines: uploads, engines and archives made by the product's own parts."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from mover.engine import Engine, EngineConfig
from mover.model import Progress, SourceObject, raw_object_key
from mover.parts import Buckets, Parts
from mover.policies.retry import RetryPolicy
from mover.reports import ArchiveReport
from mover.streams.s3_calls import S3Endpoint
from tests.servers import BucketFactory, S3Server, fresh_bucket, put_objects, s3_client

__all__ = [
    "DATASET",
    "archive",
    "fresh_buckets",
    "listing",
    "make_config",
    "make_parts",
    "named_for",
    "open_engine",
    "random_bytes",
    "unfinished_uploads",
    "upload",
]

DATASET = "20.500.11935/a-dataset"


def random_bytes(size_bytes: int, seed: int = 0) -> bytes:
    """The same bytes for the same arguments."""
    return random.Random(seed).randbytes(size_bytes)


@contextmanager
def fresh_buckets(server: S3Server) -> Iterator[Buckets]:
    """Three buckets of a test's own, which go with what is in them."""
    with fresh_bucket(server) as landing_zone, fresh_bucket(server) as staging, fresh_bucket(server) as retrieval:
        yield Buckets(landing_zone, staging, retrieval)


def make_config(
    tmp_path: Path,
    server: S3Server,
    buckets: Buckets | BucketFactory,
    *,
    endpoint_url: str = "",
    target_bytes: int = 200 << 20,
    buffer_bytes: int = 256 << 20,
    staging: bool = False,
    stall_timeout_s: float = 20.0,
) -> EngineConfig:
    """The configuration of an engine with LTS and scratch below ``tmp_path``; ``endpoint_url``: a proxy's."""
    (tmp_path / "lts").mkdir(exist_ok=True)
    (tmp_path / "scratch").mkdir(exist_ok=True)
    if not isinstance(buckets, Buckets):
        buckets = Buckets(buckets(), buckets(), buckets())
    return EngineConfig(
        s3=S3Endpoint(
            endpoint_url or server.endpoint_url,
            server.region,
            server.access_key,
            server.secret_key,
            stall_timeout_s=stall_timeout_s,
        ),
        buckets=buckets,
        lts_root=tmp_path / "lts",
        scratch_folder=tmp_path / "scratch",
        target_bytes=target_bytes,
        free_space_percentage=0.0,
        lts_file_timeout_s=10.0,
        staging=staging,
        buffer_bytes=buffer_bytes,
        retry=RetryPolicy(attempts=4, base_s=0.01, throttle_base_s=0.01),
    )


@asynccontextmanager
async def open_engine(config: EngineConfig, tell: Callable[[Progress], None] = lambda _: None) -> AsyncIterator[Engine]:
    """An engine."""
    async with Engine.open(config, tell=tell) as engine:
        yield engine


@asynccontextmanager
async def make_parts(config: EngineConfig, tell: Callable[[Progress], None] = lambda _: None) -> AsyncIterator[Parts]:
    """The parts of an engine."""
    async with Engine.open(config, tell=tell) as engine:
        yield engine._parts  # noqa: SLF001 - what pipelines are tested with


def upload(server: S3Server, bucket: str, files: Mapping[str, bytes], dataset_id: str = DATASET) -> None:
    """Puts the files of a dataset into the landing zone."""
    put_objects(server, bucket, {raw_object_key(dataset_id, path): body for path, body in files.items()})


async def archive(config: EngineConfig, dataset_id: str = DATASET) -> ArchiveReport:
    """Archives a dataset with the product's own pipeline."""
    async with Engine.open(config) as engine:
        return await engine.archive(dataset_id)


def unfinished_uploads(server: S3Server, bucket: str) -> list[str]:
    """Ids of the multipart uploads that were begun and neither completed nor aborted."""
    with s3_client(server) as client:
        return [found["UploadId"] for found in client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])]


async def listing(sizes: Mapping[str, int]) -> AsyncIterator[SourceObject]:
    """A listing of objects that need not exist."""
    for path, size_bytes in sizes.items():
        yield SourceObject(path, size_bytes, "etag", 0)


def named_for(server: S3Server, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files with names that the server can hold: moto answers 404 to keys with a newline."""
    return {path.replace("\n", " ") if server.name == "moto" else path: body for path, body in files.items()}
