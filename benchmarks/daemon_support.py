"""What the benchmarks of the daemon share: `mover serve` with its servers, transfers without end, HTTP by hand."""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, Final, Self, TypeVar
from urllib.parse import quote

import anyio
import httpx
import msgspec
from anyio.abc import ByteStream
from anyio.streams.buffered import BufferedByteReceiveStream

from benchmarks.support import add_server_options, fresh_folder, open_server
from mover.model import dataset_folder, raw_object_key
from tests.daemon_process import DaemonProcess, World, world
from tests.servers import S3Server, put_objects, s3_client

__all__ = [
    "OWNER",
    "Bystander",
    "Child",
    "Connection",
    "DaemonBench",
    "Lag",
    "Transfers",
    "add_daemon_options",
    "lag_between",
    "load",
    "open_daemon",
    "percentile",
    "summary_ms",
]

T = TypeVar("T")

OWNER: Final = "transfers"
_POLL_S: Final = 0.5
_BYSTANDER_S: Final = 0.002
_LOOKED_AT: Final = 6  # jobs begin in their order, a few at a time: only the first ones can have ended
_LAG = re.compile(r'^mover_loop_lag_seconds_bucket\{le="([^"]+)"\} (\S+)$', re.MULTILINE)


def add_daemon_options(parser: argparse.ArgumentParser) -> None:
    """The server's, and where the LTS is."""
    add_server_options(parser)
    parser.add_argument("--target", default="/dev/shm", help="file system of LTS and journal (default: /dev/shm)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


class DaemonBench(msgspec.Struct, frozen=True):
    """A daemon that is ready, with empty buckets and an empty LTS."""

    world: World
    daemon: DaemonProcess

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.world.environ["MOVER_PORT"])

    @property
    def client(self) -> httpx.Client:
        """For questions in between; may be used by several threads."""
        return self.daemon.client

    def add_datasets(self, dataset_ids: Sequence[str], files: Mapping[str, bytes]) -> None:
        """Puts the same files into several datasets: the first is uploaded, the server copies the others."""
        bucket, first = self.world.bucket, dataset_ids[0]
        bodies = {raw_object_key(first, path): body for path, body in files.items()}
        put_objects(self.world.server, bucket, bodies)
        pairs = [(path, dataset_id) for dataset_id in dataset_ids[1:] for path in files]
        with s3_client(self.world.server) as s3, ThreadPoolExecutor(8) as pool:

            def copy(pair: tuple[str, str]) -> None:
                path, dataset_id = pair
                source = f"{bucket}/{raw_object_key(first, path)}"
                s3.copy_object(Bucket=bucket, Key=raw_object_key(dataset_id, path), CopySource=source)

            list(pool.map(copy, pairs))

    def forget(self, dataset_id: str) -> None:
        """Removes a dataset from the LTS."""
        shutil.rmtree(self.world.lts / dataset_folder(dataset_id), ignore_errors=True)

    def cancel(self, job_id: str) -> None:
        """Ends a job."""
        self.client.delete(f"/v1/jobs/{quote(job_id)}").raise_for_status()

    def metrics(self) -> str:
        """As Prometheus reads them."""
        return self.client.get("/metrics").raise_for_status().text

    def received(self) -> tuple[float, float]:
        """A moment, and how many bytes had come from the S3 storage by then."""
        value = self.daemon.metric("mover_s3_received_bytes_total")
        return time.monotonic(), value


@contextmanager
def open_daemon(options: argparse.Namespace, gib: int, **settings: str) -> Iterator[DaemonBench]:
    """A daemon with its servers for the length of the block; ``gib``: what the S3 server holds at most."""
    with open_server(options, gib) as given, fresh_folder(options.target) as folder:
        server = S3Server("given", given.endpoint_url, given.access_key, given.secret_key)
        with world(folder, server) as place, place.daemon(**settings) as daemon:
            daemon.until_ready()
            yield DaemonBench(place, daemon)


class Transfers:
    """Keeps the daemon archiving: a dataset that is done is removed from the LTS and ordered again."""

    def __init__(self, bench: DaemonBench, datasets: int, size_bytes: int) -> None:
        self._bench, self._ids = bench, [f"transfers/{number}" for number in range(datasets)]
        bench.add_datasets(self._ids, {"data.bin": os.urandom(size_bytes)})
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="transfers")
        self._pending: deque[tuple[str, str]] = deque()
        self.failed = ""
        self.done = 0

    def __enter__(self) -> Self:
        for dataset_id in self._ids:
            self._order(dataset_id)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for _dataset_id, job_id in reversed(self._pending):
            self._bench.cancel(job_id)

    def until_under_way(self) -> None:
        """Returns once some datasets are done.  Raises RuntimeError when one fails."""
        before = self.done
        while self.done < before + 2:
            self.check()
            time.sleep(0.1)

    def check(self) -> None:
        """Raises RuntimeError when a dataset has failed."""
        if self.failed:
            raise RuntimeError(self.failed)

    def _order(self, dataset_id: str) -> None:
        self._pending.append((dataset_id, self._bench.daemon.order("archive", dataset_id, owner=OWNER)))

    def _run(self) -> None:
        while not self._stop.wait(_POLL_S):
            for dataset_id, job_id in list(self._pending)[:_LOOKED_AT]:
                job = self._bench.daemon.job(job_id)
                if job["state"] == "done":
                    self._pending.remove((dataset_id, job_id))
                    self._bench.forget(dataset_id)
                    self._order(dataset_id)
                    self.done += 1
                elif job["state"] == "failed":
                    self.failed = str(job["datasets"][0]["failure"])
                    return


class Bystander:
    """A thread that has nothing to do: how late it is woken is what the machine makes of any latency measured on it."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bystander")
        self.late_s: list[float] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def p99_ms(self) -> float:
        """How late, in one case of a hundred."""
        return 1000 * percentile(self.late_s, 0.99)

    def _run(self) -> None:
        while not self._stop.is_set():
            due_s = time.perf_counter() + _BYSTANDER_S
            time.sleep(_BYSTANDER_S)
            self.late_s.append(time.perf_counter() - due_s)


class Child:
    """A process of its own that does what it is told, line by line: ``python -m <module> --child``."""

    def __init__(self, module: str) -> None:
        self._module = module
        command = [sys.executable, "-m", module, "--child"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def tell(self, task: msgspec.Struct) -> None:
        """Hands it a task; returns at once."""
        stdin = _given(self._process.stdin)
        stdin.write(msgspec.json.encode(task) + b"\n")
        stdin.flush()

    def result(self, kind: type[T]) -> T:
        """What came of the task; waits for it."""
        line = _given(self._process.stdout).readline()
        if not line:
            sys.exit(f"a client of the daemon failed: {self._module}")
        return msgspec.json.decode(line, type=kind)


def _given(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise AssertionError
    return pipe


class Connection:
    """HTTP/1.1 over one connection that stays, with as little work as possible: client and daemon share processors."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._buffer = BufferedByteReceiveStream(stream)

    @classmethod
    async def open(cls, port: int) -> Connection:
        """A connection to this host."""
        return cls(await anyio.connect_tcp("127.0.0.1", port))

    async def request(self, method: str, path: str, body: bytes = b"", headers: str = "") -> tuple[int, bytes]:
        """Status and body of an answer that says how long it is."""
        await self.send(method, path, body, headers)
        status, head = await self.head()
        found = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        return status, await self._buffer.receive_exactly(int(found[1])) if found else b""

    async def send(self, method: str, path: str, body: bytes = b"", headers: str = "") -> None:
        """Only the request."""
        length = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{length}{headers}\r\n"
        await self._stream.send(head.encode() + body)

    async def head(self) -> tuple[int, bytes]:
        """Status and headers of the answer."""
        head = await self._buffer.receive_until(b"\r\n\r\n", 64 << 10)
        return int(head[9:12]), b"\r\n" + head

    async def receive(self) -> bytes:
        """Whatever comes next."""
        return await self._buffer.receive()

    async def close(self) -> None:
        """Ends it."""
        await self._stream.aclose()


class Lag(msgspec.Struct, frozen=True):
    """The loop's lag as the daemon counted it: upper bounds of the buckets, in ms, that hold the given share."""

    beats: int
    p50_ms: float
    p99_ms: float
    max_ms: float


def lag_between(before: str, after: str) -> Lag:
    """What was counted between two readings of the metrics."""
    counts = {float(edge): float(count) for edge, count in _LAG.findall(after)}
    for edge, count in _LAG.findall(before):
        counts[float(edge)] -= float(count)
    beats = counts[math.inf]

    def within(share: float) -> float:
        return 1000 * min((edge for edge, count in counts.items() if count >= share * beats), default=math.inf)

    return Lag(int(beats), within(0.5), within(0.99), within(1.0))


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summary_ms(values_s: Sequence[float]) -> tuple[float, float, float]:
    """p50, p99 and maximum, in milliseconds."""
    return 1000 * percentile(values_s, 0.5), 1000 * percentile(values_s, 0.99), 1000 * max(values_s)


def load() -> float:
    """How many processes wanted to run, on average of the last minute."""
    return os.getloadavg()[0]
