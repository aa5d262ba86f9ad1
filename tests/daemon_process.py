"""The daemon as a process of its own: `mover serve` with everything it needs, and ways to ask and to end it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import msgspec

from tests.servers import S3Server, fresh_bucket, put_objects

__all__ = ["DaemonProcess", "World", "free_port", "until", "world"]

PATIENCE_S = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(condition: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    """Polls; fails after a while. What is out of reach counts as not yet."""
    deadline_s = time.monotonic() + patience_s
    while True:
        try:
            if condition():
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline_s, "it did not come to it in time"
        time.sleep(0.05)


class DaemonProcess:
    """A running daemon; ``log`` is what it said so far."""

    def __init__(self, environ: Mapping[str, str], log: Path, arguments: tuple[str, ...] = ()) -> None:
        self._log = log
        self._began_bytes = log.stat().st_size if log.exists() else 0
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mover.cli", *arguments, "serve"],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=dict(environ),
            )
        self.url = f"http://127.0.0.1:{environ['MOVER_PORT']}"
        self.client = httpx.Client(base_url=self.url, timeout=10, trust_env=False)

    @property
    def log(self) -> str:
        return self._log.read_bytes()[self._began_bytes :].decode()

    def until_alive(self) -> None:
        until(lambda: self.process.poll() is not None or self.client.get("/livez").status_code == 200)
        assert self.process.poll() is None, self.log

    def until_ready(self) -> None:
        self.until_alive()
        until(lambda: self.client.get("/readyz").status_code == 200)

    def order(self, kind: str, *dataset_ids: str, **more: object) -> str:
        """Orders a job; returns its id."""
        answer = self.client.post("/v1/jobs", json={"kind": kind, "dataset_ids": dataset_ids, **more})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.client.get(f"/v1/jobs/{quote(job_id)}").json()
        return answer

    def until_job(self, job_id: str, *states: str) -> dict[str, Any]:
        until(lambda: self.job(job_id)["state"] in states)
        return self.job(job_id)

    def dependency(self, name: str) -> dict[str, Any]:
        views: list[dict[str, Any]] = self.client.get("/readyz").json()["dependencies"]
        return next(view for view in views if view["name"] == name)

    def metric(self, line: str) -> float:
        found = re.search(rf"^{re.escape(line)} (\S+)$", self.client.get("/metrics").text, re.MULTILINE)
        assert found, line
        return float(found.group(1))

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def exit_code(self, patience_s: float = PATIENCE_S) -> int:
        return self.process.wait(patience_s)

    def stop(self) -> int:
        """Ends it in order; returns the exit code."""
        self.signal(signal.SIGTERM)
        return self.exit_code()

    def end(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class World(msgspec.Struct, frozen=True):
    """A folder with LTS and scratch folder, buckets, and the environment that names them."""

    folder: Path
    server: S3Server
    bucket: str
    environ: dict[str, str]

    @property
    def lts(self) -> Path:
        return self.folder / "lts"

    def put(self, dataset_id: str, files: Mapping[str, bytes]) -> None:
        objects = {f"openem-network/datasets/{dataset_id}/raw_files/{path}": body for path, body in files.items()}
        put_objects(self.server, self.bucket, objects)

    @contextmanager
    def daemon(self, *arguments: str, **settings: str) -> Iterator[DaemonProcess]:
        """A daemon until the end of the block, however that ends; what it said is shown when the block fails."""
        daemon = DaemonProcess(self.environ | settings, self.folder / "daemon.log", arguments)
        try:
            yield daemon
        except BaseException:
            sys.stderr.write(daemon.log)
            raise
        finally:
            daemon.end()


@contextmanager
def world(folder: Path, server: S3Server) -> Iterator[World]:
    for name in ("lts", "scratch"):
        (folder / name).mkdir()
    with fresh_bucket(server) as bucket, fresh_bucket(server) as retrieval:
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("MOVER_", "PREFECT_"))}
        environ |= {
            "MINIO_ENDPOINT": server.endpoint_url,
            "MINIO_USER": server.access_key,
            "MINIO_PASSWORD": server.secret_key,
            "MINIO_REGION": server.region,
            "MINIO_LANDINGZONE_BUCKET": bucket,
            "MINIO_RETRIEVAL_BUCKET": retrieval,
            "LTS_STORAGE_ROOT": str(folder / "lts"),
            "LTS_FREE_SPACE_PERCENTAGE": "0",
            "ARCHIVER_SCRATCH_FOLDER": str(folder / "scratch"),
            "MOVER_PORT": str(free_port()),
            "MOVER_DRAIN_S": "1",
        }
        yield World(folder, server, bucket, environ)
