"""The mixed jobs of the soak: clients that order, follow, cancel and clean up, each dataset with a name of its own."""

from __future__ import annotations

import itertools
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Final, Self
from urllib.parse import quote

import httpx
from types_boto3_s3 import S3Client

from benchmarks.daemon_support import DaemonBench
from benchmarks.support import KIB, MIB
from mover.model import raw_files_prefix
from tests.servers import put_objects, s3_client

__all__ = ["SoakClients"]

_SMALL: Final = {f"{number:02d}.bin": os.urandom(16 * KIB + number) for number in range(20)}
_LARGE: Final = {"a.bin": os.urandom(96 * MIB), "b.bin": os.urandom(160 * MIB)}
_LARGE_CLIENTS: Final = 1
_PATIENCE_S: Final = 300.0
_FINAL: Final = {"done", "failed", "cancelled"}


class SoakClients:
    """Clients in threads, until the end of the block. ``ended``: jobs by kind, size and state; ``wrong``: surprises."""

    def __init__(self, bench: DaemonBench, clients: int, seed: int) -> None:
        self._bench = bench
        self._stop = threading.Event()
        self.ended: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._threads = [
            threading.Thread(target=self._run, args=(number, random.Random(seed + number)), name=f"client-{number}")
            for number in range(clients)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def jobs(self) -> int:
        """How many jobs have ended."""
        return self.ended.total()

    def _run(self, number: int, rng: random.Random) -> None:
        with ExitStack() as stack:
            s3 = stack.enter_context(s3_client(self._bench.world.server))
            http = stack.enter_context(httpx.Client(base_url=self._bench.daemon.url, timeout=30, trust_env=False))
            size, files = ("large", _LARGE) if number < _LARGE_CLIENTS else ("small", _SMALL)
            client = _Client(self._bench, http, s3, rng, self.ended)
            for turn in itertools.count():
                if self._stop.is_set():
                    return
                try:
                    client.turn(f"soak/{number}-{turn}", size, files)
                except Exception as error:  # noqa: BLE001 - what a client meets is a result
                    self.wrong.append(f"{type(error).__name__}: {error}")
                    if len(self.wrong) > 20:
                        return


class _Client:
    def __init__(
        self, bench: DaemonBench, http: httpx.Client, s3: S3Client, rng: random.Random, ended: Counter[str]
    ) -> None:
        self._bench, self._http, self._s3, self._rng, self._ended = bench, http, s3, rng, ended

    def turn(self, dataset_id: str, size: str, files: Mapping[str, bytes]) -> None:
        """A dataset from its upload to the removal of all of it, with one mishap on its way."""
        world = self._bench.world
        prefix = raw_files_prefix(dataset_id)
        put_objects(world.server, world.bucket, {prefix + path: body for path, body in files.items()})
        try:
            self._job("plan", dataset_id, size, "done")
            self._rng.choice(self._mishaps)(dataset_id, size)
            self._job("archive", dataset_id, size, "done", release_source=self._rng.random() < 0.5)
            self._job("verify", dataset_id, size, "done", level=self._rng.choice(("written", "read-back")))
            self._job("retrieve", dataset_id, size, "done", form=self._rng.choice(("datablocks", "files")))
        finally:
            self._bench.forget(dataset_id)
            self._remove(world.bucket, lambda key: key.startswith(prefix), prefix)
            self._remove(world.environ["MINIO_RETRIEVAL_BUCKET"], lambda key: f"{dataset_id}/" in key)

    @property
    def _mishaps(self) -> tuple[Callable[[str, str], None], ...]:
        return self._nothing_there, self._never_archived, self._cancelled, self._refused

    def _nothing_there(self, dataset_id: str, _size: str) -> None:
        self._job("archive", f"{dataset_id}-empty", "none", "failed")

    def _never_archived(self, dataset_id: str, _size: str) -> None:
        self._job("retrieve", f"{dataset_id}-unknown", "none", "failed")

    def _cancelled(self, dataset_id: str, size: str) -> None:
        job_id = self._order("archive", dataset_id)
        time.sleep(self._rng.uniform(0.0, 0.4))
        self._http.delete(f"/v1/jobs/{quote(job_id)}").raise_for_status()
        self._end("archive", size, job_id, "cancelled", "done")

    def _refused(self, dataset_id: str, _size: str) -> None:
        answer = self._http.post("/v1/jobs", json={"kind": "archive", "dataset_ids": [dataset_id], "colour": "red"})
        if answer.status_code != 400:
            raise RuntimeError(answer.text)
        if self._http.get("/v1/jobs/unknown").status_code != 404:
            raise RuntimeError(dataset_id)

    def _job(self, kind: str, dataset_id: str, size: str, expected: str, **options: object) -> None:
        self._end(kind, size, self._order(kind, dataset_id, **options), expected)

    def _order(self, kind: str, dataset_id: str, **options: object) -> str:
        body = {"kind": kind, "dataset_ids": [dataset_id], "options": options, "owner": self._rng.choice("abc")}
        answer = self._http.post("/v1/jobs", json=body, headers={"Idempotency-Key": f"{self._rng.getrandbits(64):x}"})
        if answer.status_code != 202:
            raise RuntimeError(answer.text)
        return str(answer.json()["id"])

    def _end(self, kind: str, size: str, job_id: str, *expected: str) -> None:
        """Follows the job by its events, now and then not to the end, or by asking; checks how it ended."""
        if self._rng.random() < 0.5:
            self._follow(job_id, leave=self._rng.random() < 0.3)
        job = self._poll(job_id)
        self._ended[f"{kind}, {size}, {job['state']}"] += 1
        failure = job["datasets"][0]["failure"] or {}
        if job["state"] not in expected or (job["state"] == "failed" and failure.get("fault") != "user"):
            raise RuntimeError(json.dumps(job)[:1000])

    def _follow(self, job_id: str, *, leave: bool) -> None:
        headers = {"Accept": "text/event-stream"}
        with self._http.stream("GET", f"/v1/jobs/{quote(job_id)}/events", headers=headers) as answer:
            for line in answer.iter_lines():
                if line == "event: end" or leave:
                    return

    def _poll(self, job_id: str) -> dict[str, Any]:
        deadline_s = time.monotonic() + _PATIENCE_S
        while True:
            job: dict[str, Any] = self._http.get(f"/v1/jobs/{quote(job_id)}").raise_for_status().json()
            if job["state"] in _FINAL:
                return job
            if time.monotonic() > deadline_s:
                raise TimeoutError(json.dumps(job)[:1000])
            time.sleep(0.1)

    def _remove(self, bucket: str, wanted: Callable[[str], bool], prefix: str = "") -> None:
        pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        for key in [item["Key"] for page in pages for item in page.get("Contents", []) if wanted(item["Key"])]:
            self._s3.delete_object(Bucket=bucket, Key=key)
