"""Real S3 servers for tests, as fixtures; a pytest plugin that ``conftest.py`` loads.

``moto_server``  moto in a process of its own; complete, slow.
``rgw_server``   Ceph RGW (``docker/rgw/ceph-rgw``), or the one that TEST_RGW=<url>,<user>,<password> names.
``rclone_server``  ``rclone serve s3``: quick, ignores If-Match, returns the whole object's checksum on ranged GETs.
``s3_server``    the test runs once with moto and once with RGW.
``bucket``       makes buckets on ``s3_server`` that are gone after the test.

Where Ceph's programs are missing, tests that need them fail when ``CI`` is set, and are left out with a line in the
report otherwise.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, build_opener

import msgspec
import pytest

if TYPE_CHECKING:
    from boto3.session import Session
    from types_boto3_s3 import S3Client
    from types_boto3_s3.type_defs import ObjectIdentifierTypeDef

__all__ = [
    "BucketFactory",
    "S3Server",
    "fresh_bucket",
    "moto",
    "object_keys",
    "put_objects",
    "s3_client",
]

BucketFactory = Callable[[], str]

_RGW_SCRIPT = Path(__file__).parent.parent / "docker" / "rgw" / "ceph-rgw"
_RGW_PROGRAMS = ("radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd", "monmaptool", "curl", "uuidgen")
_RGW_FOLDER = "mover-test-rgw-"
_RGW_STARTS = 3  # a port that was free may be taken by the time that its program binds it
_RGW_PACKAGES = "radosgw ceph-mon ceph-osd ceph-common uuid-runtime curl"
_RGW_GIVEN = os.environ.get("TEST_RGW", "")
_START_TIMEOUT_S = 30.0
_RGW_TIMEOUT_S = 240  # the first test that needs it waits for its start, which may take several attempts
_LEFT_OUT = pytest.StashKey[int]()


class S3Server(msgspec.Struct, frozen=True):
    """How to reach a server. Path-style addressing, any region name."""

    name: str
    endpoint_url: str
    access_key: str
    secret_key: str
    region: str = "us-east-1"


# --------------------------------------------------------------------------------------------------------- helpers
@cache
def _session() -> Session:
    """One for all clients: each new one reads botocore's models again, which takes longer than most tests."""
    import boto3

    return boto3.session.Session()


@contextmanager
def s3_client(server: S3Server) -> Iterator[S3Client]:
    """A boto3 client, closed at the end; it may be used by several threads."""
    from botocore.config import Config

    client = _session().client(
        "s3",
        endpoint_url=server.endpoint_url,
        region_name=server.region,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        config=Config(
            max_pool_connections=16,
            proxies={},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path"},
        ),
    )
    try:
        yield client
    finally:
        client.close()


def put_objects(server: S3Server, bucket: str, objects: Mapping[str, bytes]) -> dict[str, str]:
    """Uploads ``objects`` (content by key), several at a time; returns their ETags without quotes, by key."""
    with s3_client(server) as client, ThreadPoolExecutor(8) as pool:

        def put(item: tuple[str, bytes]) -> tuple[str, str]:
            key, body = item
            return key, client.put_object(Bucket=bucket, Key=key, Body=body)["ETag"].strip('"')

        return dict(pool.map(put, objects.items()))


def object_keys(server: S3Server, bucket: str, prefix: str = "") -> list[str]:
    """All keys below ``prefix``, sorted as the server sorts them."""
    with s3_client(server) as client:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]


@contextmanager
def fresh_bucket(server: S3Server) -> Iterator[str]:
    """A bucket that nobody else uses; removed at the end with its objects and unfinished uploads."""
    bucket = f"test-{uuid.uuid4().hex[:16]}"
    with s3_client(server) as client:
        client.create_bucket(Bucket=bucket)
    try:
        yield bucket
    finally:
        _remove_bucket(server, bucket)


def _remove_bucket(server: S3Server, bucket: str) -> None:
    keys = object_keys(server, bucket)
    with s3_client(server) as client, ThreadPoolExecutor(8) as pool:
        if server.name == "moto":  # quick; elsewhere batches may be what is tested
            for start in range(0, len(keys), 1000):
                batch: list[ObjectIdentifierTypeDef] = [{"Key": key} for key in keys[start : start + 1000]]
                client.delete_objects(Bucket=bucket, Delete={"Objects": batch, "Quiet": True})
        else:
            list(pool.map(lambda key: client.delete_object(Bucket=bucket, Key=key), keys))
        if server.name != "rclone":  # it has no listing of uploads
            for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket):
                for upload in page.get("Uploads", []):
                    client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        client.delete_bucket(Bucket=bucket)


# -------------------------------------------------------------------------------------------------------- fixtures
@contextmanager
def moto(folder: Path) -> Iterator[S3Server]:
    """A moto server until the end of the block; its log goes to ``folder``."""

    def command(port: int) -> list[str]:
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]

    with _serving(command, folder / "moto.log") as url:
        yield S3Server("moto", url, "test", "test-secret")


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def rclone_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    program = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.fail("rclone is not installed (extra: bench)")
    folder = tmp_path_factory.mktemp("rclone")
    (folder / "data").mkdir()
    options = ["--config", str(folder / "rclone.conf"), "--auth-key", "test,test-secret", "--vfs-cache-mode", "off"]

    def command(port: int) -> list[str]:
        return [str(program), "serve", "s3", "--addr", f"127.0.0.1:{port}", *options, str(folder / "data")]

    with _serving(command, folder / "rclone.log") as url:
        yield S3Server("rclone", url, "test", "test-secret")


def _start_rgw(command: list[str]) -> subprocess.CompletedProcess[str]:
    options = ["--port", "0", "--mon-port", "0", "--user", "test", "--password", "test-secret", "--gib", "6"]
    said = ""
    for _ in range(_RGW_STARTS):
        started = subprocess.run([*command, *options], check=False, capture_output=True, text=True, timeout=200)
        if not started.returncode:
            return started
        said = started.stderr
    pytest.fail(f"Ceph RGW does not start:\n{said}")


@pytest.fixture(scope="session")
def rgw_server() -> Iterator[S3Server]:
    if _RGW_GIVEN:
        yield S3Server("rgw", *_RGW_GIVEN.split(","))
        return
    if missing := _missing_programs():
        pytest.fail(f"Ceph RGW is not installed ({', '.join(missing)}): apt-get install {_RGW_PACKAGES}")
    for left in _memory_folder().glob(f"{_RGW_FOLDER}*"):  # by a run that was killed
        if not Path("/proc", left.name.removeprefix(_RGW_FOLDER)).exists():
            subprocess.run([str(_RGW_SCRIPT), "--stop", "--dir", str(left)], check=False, timeout=60)
    folder = _memory_folder() / f"{_RGW_FOLDER}{os.getpid()}"
    command = [str(_RGW_SCRIPT), "--dir", str(folder)]
    try:
        started = _start_rgw(command)
        yield S3Server("rgw", started.stdout.splitlines()[-1], "test", "test-secret")
    finally:
        subprocess.run([*command, "--stop"], check=True, timeout=60)


@pytest.fixture(params=["moto", pytest.param("rgw", marks=pytest.mark.rgw)])
def s3_server(request: pytest.FixtureRequest) -> S3Server:
    server: S3Server = request.getfixturevalue(f"{request.param}_server")
    return server


@pytest.fixture
def bucket(s3_server: S3Server) -> Iterator[BucketFactory]:
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield lambda: stack.enter_context(fresh_bucket(s3_server))


# ------------------------------------------------------------------------------------------------ programs and ports
@contextmanager
def _serving(command: Callable[[int], Sequence[str]], log: Path) -> Iterator[str]:
    """Runs a server on a free port of loopback until the end of the block; 3 attempts, as ports get taken."""
    for _ in range(3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("RCLONE_")}
        with log.open("ab") as out:
            process = subprocess.Popen(
                command(port), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environ
            )
        try:
            if _wait_until_it_answers(f"http://127.0.0.1:{port}/", process):
                yield f"http://127.0.0.1:{port}"
                return
        finally:
            process.kill()
            process.wait()
    pytest.fail(f"{command(0)[0]} does not start:\n{log.read_text(errors='replace')[-2000:]}")


def _wait_until_it_answers(url: str, process: subprocess.Popen[bytes]) -> bool:
    opener = build_opener(ProxyHandler({}))
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            opener.open(url, timeout=2).close()
        except HTTPError as refused:  # an answer all the same
            refused.close()
            return process.poll() is None
        except (URLError, OSError):
            time.sleep(0.05)
        else:
            return process.poll() is None
    return False


def _memory_folder() -> Path:
    folder = Path("/dev/shm")
    return folder if os.access(folder, os.W_OK) else Path("/tmp")


def _missing_programs() -> list[str]:
    return [program for program in _RGW_PROGRAMS if shutil.which(program) is None]


# ----------------------------------------------------------------------------------------------------------- hooks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what needs RGW, which is slow, and leaves it out where that cannot run, unless this is CI."""
    for item in items:
        if "rgw_server" in getattr(item, "fixturenames", ()):
            item.add_marker("rgw")
        if item.get_closest_marker("rgw"):
            item.add_marker("slow")
        if item.get_closest_marker("rgw") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(_RGW_TIMEOUT_S))
    if _RGW_GIVEN or os.environ.get("CI") or not _missing_programs():
        return
    left_out = [item for item in items if item.get_closest_marker("rgw")]
    if left_out:
        config.stash[_LEFT_OUT] = len(left_out)
        items[:] = [item for item in items if not item.get_closest_marker("rgw")]
        config.hook.pytest_deselected(items=left_out)


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """The line that says so."""
    count = config.stash.get(_LEFT_OUT, 0)
    text = f"rgw: not installed, {count} tests need it and are left out (Debian: apt-get install {_RGW_PACKAGES})"
    return [text] if count else []
