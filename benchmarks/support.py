"""What the benchmarks share: a server, datasets on it, the engine in a process of its own, and tables."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
import msgspec
import obstore
import obstore.store

from mover.engine import Engine, EngineConfig
from mover.model import Progress, raw_object_key
from mover.parts import Buckets
from mover.streams.s3_calls import S3Endpoint

__all__ = [
    "DATASET",
    "KIB",
    "MIB",
    "Server",
    "Shape",
    "add_server_options",
    "engine_config",
    "fresh_folder",
    "open_engine",
    "open_server",
    "print_table",
    "program",
    "s5cmd",
    "spread",
    "uploaded",
]

KIB, MIB = 1 << 10, 1 << 20
DATASET = "bench/1"

_RGW = Path(__file__).parent.parent / "docker" / "rgw" / "ceph-rgw"
_UPLOADS = 16
_PIECE_BYTES = 64 * MIB


class Server(msgspec.Struct, frozen=True):
    """An S3 server."""

    endpoint_url: str
    access_key: str
    secret_key: str


class Shape(msgspec.Struct, frozen=True):
    """A dataset of objects of one size."""

    name: str
    objects: int
    size_bytes: int

    @property
    def total_bytes(self) -> int:
        """Payload."""
        return self.objects * self.size_bytes


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """``--endpoint`` and its keys; without them a Ceph RGW is started."""
    parser.add_argument("--endpoint", help="URL of an S3 server (default: start Ceph RGW, data in memory)")
    parser.add_argument("--access-key", default="admin")
    parser.add_argument("--secret-key", default="adminpass")


@contextmanager
def open_server(options: argparse.Namespace, gib: int) -> Iterator[Server]:
    """The given server, or one that ends with the block and holds at most ``gib`` GiB. SIGTERM ends the block, too."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if options.endpoint:
        yield Server(options.endpoint, options.access_key, options.secret_key)
        return
    folder = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp", f"mover-bench-rgw-{os.getpid()}")
    command = [str(_RGW), "--dir", str(folder)]
    start = [*command, "--port", "0", "--mon-port", "0", "--user", options.access_key, "--password", options.secret_key]
    try:
        started = subprocess.run([*start, "--gib", str(gib)], check=True, stdout=subprocess.PIPE, text=True)
        yield Server(started.stdout.splitlines()[-1], options.access_key, options.secret_key)
    finally:
        subprocess.run([*command, "--stop"], check=True)


def program(name: str) -> str:
    """Path of a program that the ``bench`` extra brings."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        sys.exit(f"{name} is not installed (extra: bench)")
    return found


def s5cmd(server: Server, *arguments: str) -> None:
    """Runs ``s5cmd``.  Raises CalledProcessError."""
    keys = {
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
        "AWS_REGION": "us-east-1",
    }
    command = [program("s5cmd"), "--log", "error", "--endpoint-url", server.endpoint_url, *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | keys)


@contextmanager
def uploaded(server: Server, shape: Shape) -> Iterator[str]:
    """A bucket with the dataset, for the length of the block."""
    bucket = f"bench-{uuid.uuid4().hex[:12]}"
    s5cmd(server, "mb", f"s3://{bucket}")
    try:
        anyio.run(_upload, server, bucket, shape)
        yield bucket
    finally:
        s5cmd(server, "rm", f"s3://{bucket}/*")
        s5cmd(server, "rb", f"s3://{bucket}")


async def _upload(server: Server, bucket: str, shape: Shape) -> None:
    store = obstore.store.S3Store(
        bucket,
        endpoint=server.endpoint_url,
        region="us-east-1",
        access_key_id=server.access_key,
        secret_access_key=server.secret_key,
        virtual_hosted_style_request=False,
        client_options={"allow_http": True, "timeout": "600s"},
    )
    pattern = os.urandom(min(shape.size_bytes, _PIECE_BYTES))
    numbers = iter(range(shape.objects))

    async def upload() -> None:
        for number in numbers:  # shared: each task takes the next one
            key = raw_object_key(DATASET, f"{number // 1000:03d}/{number:06d}.bin")
            if shape.size_bytes <= _PIECE_BYTES:
                body = number.to_bytes(8, "big") + pattern[8:]
                await obstore.put_async(store, key, body, use_multipart=False)
            else:
                await obstore.put_async(store, key, _pieces(number, shape, pattern), chunk_size=_PIECE_BYTES)

    async with anyio.create_task_group() as tasks:
        for _ in range(_UPLOADS if shape.size_bytes <= _PIECE_BYTES else 1):
            tasks.start_soon(upload)


def _pieces(number: int, shape: Shape, pattern: bytes) -> Iterator[bytes]:
    for start in range(0, shape.size_bytes, _PIECE_BYTES):
        piece = (number << 32 | start // _PIECE_BYTES).to_bytes(8, "big") + pattern[8:]
        yield piece[: shape.size_bytes - start]


def engine_config(server: Server, bucket: str, folder: Path, **fields: int) -> EngineConfig:
    """An engine with LTS and scratch below ``folder``; ``fields`` are those of EngineConfig."""
    config = EngineConfig(
        s3=S3Endpoint(server.endpoint_url, "us-east-1", server.access_key, server.secret_key),
        buckets=Buckets(landing_zone=bucket, staging=bucket, retrieval=bucket),
        lts_root=folder / "lts",
        scratch_folder=folder / "scratch",
        free_space_percentage=0,
    )
    return msgspec.structs.replace(config, **fields)


@asynccontextmanager
async def open_engine(config: EngineConfig, tell: Callable[[Progress], None] = lambda _: None) -> AsyncIterator[Engine]:
    """An engine whose folders are made first."""
    config.lts_root.mkdir(parents=True, exist_ok=True)
    config.scratch_folder.mkdir(parents=True, exist_ok=True)
    async with Engine.open(config, tell=tell) as engine:
        yield engine


@contextmanager
def fresh_folder(parent: str) -> Iterator[Path]:
    """An empty folder that is gone after the block."""
    with TemporaryDirectory(prefix="mover-bench-", dir=parent) as folder:
        yield Path(folder)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and the smallest and largest value."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns, the first one left-aligned."""
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for row in table:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([f"{row[0]:<{widths[0]}}", *cells]))
