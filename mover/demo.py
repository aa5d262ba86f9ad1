"""The demonstration: a folder goes to an embedded S3 storage, to a folder as LTS, and all the way back."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread
import httpx
import msgspec

from mover.demo_data import DemoFiles, check_room, compare, make_folder, scan
from mover.demo_server import embedded_s3
from mover.engine import Engine, EngineConfig
from mover.errors import LayoutMismatchError, ObjectAccessError
from mover.model import DatasetPlan, Progress, archive_id, raw_files_prefix
from mover.parts import Buckets
from mover.reports import RetrieveReport
from mover.streams.s3 import S3Store
from mover.streams.s3_calls import S3Endpoint
from mover.streams.tar import extract_archive
from mover.tasks import open_task_group

__all__ = ["DATASET_ID", "DemoReport", "DemoStep", "run_demo"]

T = TypeVar("T")

DATASET_ID = "demo/files"
_BUCKETS = Buckets(landing_zone="landingzone", staging="staging", retrieval="retrieval")
_UPLOADS_AT_A_TIME = 16
_DOWNLOADS_AT_A_TIME = 4
_DOWNLOAD_TIMEOUT_S = 60.0


class DemoStep(msgspec.Struct, frozen=True):
    """One step: what was done, with how many bytes, in how many seconds."""

    name: str
    what: str
    size_bytes: int
    elapsed_s: float


class DemoReport(msgspec.Struct, frozen=True):
    """What the demonstration did and where it is; ``differences`` is empty when everything came back as it was."""

    folder: str
    workplace: str
    file_count: int
    payload_bytes: int
    steps: tuple[DemoStep, ...]
    skipped: tuple[tuple[str, str], ...]
    empty_folders: int
    datablocks: tuple[str, ...]
    differences: tuple[str, ...]
    elapsed_s: float


class _Demo:
    """One run; each step adds itself to ``steps``."""

    def __init__(self, workplace: Path, tell: Callable[[Progress], None]) -> None:
        self.workplace, self.tell = workplace, tell
        self.lts, self.unpacked = workplace / "lts", workplace / "unpacked"
        self.steps: list[DemoStep] = []

    async def step(self, name: str, call: Callable[[], Awaitable[T]], tell: Callable[[T], tuple[str, int]]) -> T:
        """Times ``call``; ``tell`` makes words and bytes of its result."""
        began = time.monotonic()
        result = await call()
        what, size_bytes = tell(result)
        self.steps.append(DemoStep(name, what, size_bytes, time.monotonic() - began))
        return result


async def run_demo(
    folder: Path | None,
    *,
    target_bytes: int,
    buffer_bytes: int,
    keep: bool,
    tell: Callable[[Progress], None] = lambda _: None,
) -> DemoReport:
    """Archives, verifies and retrieves ``folder`` (None: a small generated one), and compares.

    Raises:
        ConfigError: the folder is none, or too large for this host.
        MoverError: a step failed.
    """
    workplace = Path(await anyio.to_thread.run_sync(lambda: tempfile.mkdtemp(prefix="mover-demo-")))
    try:
        return await _run(_Demo(workplace, tell), folder, target_bytes, buffer_bytes)
    finally:
        if not keep:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(lambda: shutil.rmtree(workplace, ignore_errors=True))


async def _run(demo: _Demo, folder: Path | None, target_bytes: int, buffer_bytes: int) -> DemoReport:
    began = time.monotonic()
    source, files = await anyio.to_thread.run_sync(_prepare, folder, demo.workplace)
    async with embedded_s3() as url:
        config = EngineConfig(
            S3Endpoint(url, "us-east-1", "demo", "demo-secret"),
            _BUCKETS,
            demo.lts,
            demo.workplace / "scratch",
            target_bytes=target_bytes,
            free_space_percentage=0.0,
            buffer_bytes=buffer_bytes,
        )
        datablocks, differences = await _there_and_back(demo, config, files)
    return DemoReport(
        folder=str(source),
        workplace=str(demo.workplace),
        file_count=len(files.files),
        payload_bytes=files.size_bytes,
        steps=tuple(demo.steps),
        skipped=files.skipped,
        empty_folders=files.empty_folders,
        datablocks=datablocks,
        differences=tuple(differences),
        elapsed_s=time.monotonic() - began,
    )


def _prepare(folder: Path | None, workplace: Path) -> tuple[Path, DemoFiles]:
    for name in ("lts", "scratch", "download", "unpacked"):
        (workplace / name).mkdir()
    source = workplace / "source" if folder is None else folder.absolute()
    if folder is None:
        source.mkdir()
        make_folder(source)
    files = scan(source, len(raw_files_prefix(DATASET_ID)))
    check_room(files, workplace)
    return source, files


async def _there_and_back(demo: _Demo, config: EngineConfig, files: DemoFiles) -> tuple[tuple[str, ...], list[str]]:
    payload = files.size_bytes
    await demo.step("upload", lambda: _upload(config.s3, files), lambda _: (f"{len(files.files):,} files", payload))
    plan, report = await _through_engine(demo, config)
    downloaded = await demo.step(
        "download", lambda: _download(report, demo.workplace / "download"), lambda _: ("by links", _bytes(report))
    )
    datablocks = tuple(str(demo.lts / archive_id(DATASET_ID, item.number)) for item in plan.datablocks)
    size_bytes = plan.size_bytes
    if await anyio.to_thread.run_sync(shutil.which, "tar") is not None:
        await demo.step("tar tf", lambda: _list_with_tar(datablocks), lambda count: (f"{count:,} members", size_bytes))
    await demo.step("unpack", lambda: _unpack(downloaded, demo.unpacked), lambda _: ("with tarfile", size_bytes))
    differences = await demo.step(
        "compare",
        lambda: anyio.to_thread.run_sync(compare, files, demo.unpacked),
        lambda found: (f"{len(found):,} differences" if found else "byte-identical", payload),
    )
    return datablocks, differences


async def _through_engine(demo: _Demo, config: EngineConfig) -> tuple[DatasetPlan, RetrieveReport]:
    async with Engine.open(config, tell=demo.tell) as engine:
        plan = await demo.step("plan", lambda: engine.plan(DATASET_ID), _planned)
        await demo.step(
            "archive", lambda: engine.archive(DATASET_ID), lambda report: ("moved and read back", report.size_bytes)
        )
        await demo.step(
            "verify", lambda: engine.verify(DATASET_ID), lambda report: ("read again", report.counters.lts_read_bytes)
        )
        report = await demo.step("retrieve", lambda: engine.retrieve(DATASET_ID), _retrieved)
    return plan, report


def _planned(plan: DatasetPlan) -> tuple[str, int]:
    return f"{len(plan.datablocks):,} datablocks", plan.size_bytes


def _retrieved(report: RetrieveReport) -> tuple[str, int]:
    return f"{len(report.objects):,} objects", _bytes(report)


def _bytes(report: RetrieveReport) -> int:
    return sum(item.size_bytes for item in report.objects)


async def _upload(endpoint: S3Endpoint, files: DemoFiles) -> None:
    prefix = raw_files_prefix(DATASET_ID)
    pending = iter(files.files)

    async def work(store: S3Store) -> None:
        for file in pending:  # shared: each task takes the next one
            body = await anyio.to_thread.run_sync(file.source.read_bytes)
            await store.put(_BUCKETS.landing_zone, prefix + file.path, body, {})

    async with S3Store.open(endpoint) as store:
        for bucket in (_BUCKETS.landing_zone, _BUCKETS.staging, _BUCKETS.retrieval):
            await store.create_bucket_if_missing(bucket)
        async with open_task_group() as tasks:
            for _ in range(_UPLOADS_AT_A_TIME):
                tasks.start_soon(work, store)


async def _download(report: RetrieveReport, folder: Path) -> list[Path]:
    """Fetches the objects by their links, as a scientist does."""
    pending = iter(report.objects)

    async def work(client: httpx.AsyncClient) -> None:
        for item in pending:
            path = folder / item.key.rpartition("/")[2]
            async with _fetched(client, item.key, item.url) as response, await anyio.open_file(path, "wb") as file:
                async for piece in response.aiter_bytes(1 << 20):
                    await file.write(piece)

    # Loopback: proxies of the environment do not apply.
    async with httpx.AsyncClient(timeout=_DOWNLOAD_TIMEOUT_S, trust_env=False) as client, open_task_group() as tasks:
        for _ in range(_DOWNLOADS_AT_A_TIME):
            tasks.start_soon(work, client)
    return [folder / item.key.rpartition("/")[2] for item in report.objects]


@asynccontextmanager
async def _fetched(client: httpx.AsyncClient, key: str, url: str) -> AsyncIterator[httpx.Response]:
    async with client.stream("GET", url) as response:
        if response.status_code != httpx.codes.OK:
            raise ObjectAccessError("download", key, str(response.status_code))
        yield response


async def _list_with_tar(datablocks: Iterable[str]) -> int:
    """Members that the system's tar sees; it writes one line for each, whatever the names."""
    count = 0
    for path in datablocks:
        done = await anyio.to_thread.run_sync(_run_tar, path)
        if done.returncode:
            raise LayoutMismatchError(path, "exit code of tar", 0, done.returncode)
        count += done.stdout.count(b"\n")
    return count


def _run_tar(path: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["tar", "tf", path], check=False, capture_output=True)  # noqa: S607 - the user's own tar


async def _unpack(archives: Iterable[Path], folder: Path) -> None:
    for path in archives:
        await anyio.to_thread.run_sync(extract_archive, path, folder)
