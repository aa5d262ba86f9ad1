"""What tests with killed processes share: a dataset on a real server, ``mover archive`` runs, and what became of it.

Everything is observed from outside: requests by a proxy of its own for each run, journal and manifests as files.
"""

from __future__ import annotations

import json
import math
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

import msgspec
import xxhash
from anyio.from_thread import BlockingPortal, start_blocking_portal

from mover.model import EvidenceLevel, Manifest, dataset_folder, raw_files_prefix, window_range
from tests.crash_child import Command, Point, Start, Wait
from tests.faults import FaultProxy, Rule, Seen
from tests.servers import S3Server, object_keys

__all__ = ["Durable", "Kennel", "Requests", "Run", "Scene", "WindowId", "digest_of", "make_files", "open_kennel"]

WindowId = tuple[int, int, int]
"""(number of the datablock, index of the member, number of the window)"""

_PIECE_BYTES = 4 << 20


class Run:
    """One process under way. ``requests`` are those of this process alone."""

    def __init__(self, kennel: Kennel, pid: int, folder: Path, proxy: FaultProxy) -> None:
        self._kennel, self._pid, self._folder = kennel, pid, folder
        self._watched = os.pidfd_open(pid)
        self._code: int | None = None
        self.proxy = proxy

    @property
    def requests(self) -> Requests:
        """What it asked the server for."""
        return Requests(self.proxy.seen)

    @property
    def stderr(self) -> str:
        """What it said."""
        return (self._folder / "stderr").read_text(errors="replace")

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document that it printed."""
        document: dict[str, Any] = json.loads((self._folder / "stdout").read_text())
        return document

    def signal(self, number: int) -> None:
        """Sends a signal."""
        signal.pidfd_send_signal(self._watched, number)

    def ends_within(self, seconds: float) -> bool:
        """Waits for the end of the process, so long."""
        return bool(select.select([self._watched], [], [], seconds)[0])

    def wait(self, timeout_s: float = 120) -> int:
        """Its exit code; negative: the signal that ended it."""
        if self._code is None:
            assert self.ends_within(timeout_s), f"still running after {timeout_s} s:\n{self.stderr}"
            self._code = self._kennel.wait(self._pid)
            os.close(self._watched)
        return self._code

    def kill(self) -> int:
        """SIGKILL; the exit code, as the process may have ended on its own before."""
        if self._code is None:
            self.signal(signal.SIGKILL)
        return self.wait()

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 60) -> None:
        """Waits until its proxy has seen or served what ``condition`` asks for."""
        self._kennel.portal.start_task_soon(self.proxy.wait_until, condition).result(timeout_s)


class Requests:
    """GET requests for objects: key, first byte, byte after the last (infinite: the whole object)."""

    def __init__(self, seen: Sequence[Seen]) -> None:
        self.ranges: list[tuple[str, int, float]] = []
        for item in seen:
            path, _, query = item.target.partition("?")
            key = unquote(path).partition("/")[2].partition("/")[2]
            if item.method == "GET" and key and not query:
                self.ranges.append((key, *_range(item.headers.get("range"))))

    def touch(self, key: str, start: int, end: int) -> bool:
        """Whether any of these bytes was asked for; of an empty file: whether it was asked for at all."""
        return any(name == key and first < max(end, start + 1) and last > start for name, first, last in self.ranges)


def _range(header: str | None) -> tuple[int, float]:
    if header is None:
        return 0, math.inf
    first, _, last = header.removeprefix("bytes=").partition("-")
    return int(first), int(last) + 1


class Durable(msgspec.Struct, frozen=True):
    """What must not be fetched again: windows in a journal, and whole datablocks that have a manifest."""

    windows: frozenset[WindowId]
    committed: frozenset[int]

    def fetched_again(self, manifests: Sequence[Manifest], requests: Requests) -> list[WindowId]:
        """Windows that were durable and were asked for all the same; ``manifests`` say what they are."""
        return [
            (manifest.number, index, window)
            for manifest in manifests
            for index, member in enumerate(manifest.members)
            for window in range(len(member.windows))
            if manifest.number in self.committed or (manifest.number, index, window) in self.windows
            if requests.touch(member.key, *window_range(member.size_bytes, window))
        ]


class Kennel:
    """Starts processes from one that has everything imported: imports take longer than most runs."""

    def __init__(self, process: subprocess.Popen[bytes], portal: BlockingPortal) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin: IO[bytes] = process.stdin
        self._stdout: IO[bytes] = process.stdout
        self.portal = portal

    def start(self, command: Start) -> int:
        """Starts a process; returns its id."""
        return self._ask(command)

    def wait(self, pid: int) -> int:
        """Takes the exit code of a process that ended."""
        return self._ask(Wait(pid))

    def _ask(self, command: Command) -> int:
        self._stdin.write(msgspec.json.encode(command) + b"\n")
        self._stdin.flush()
        return int(self._stdout.readline())


@contextmanager
def open_kennel() -> Iterator[Kennel]:
    """A kennel, and the event loop of the proxies in a thread of its own."""
    environ = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "TMPDIR") if name in os.environ}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.crash_child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ
    )
    with process, start_blocking_portal(backend_options={"use_uvloop": True}) as portal:
        yield Kennel(process, portal)


class Scene:
    """A dataset in a bucket, an LTS folder and a scratch folder. ``digests`` are the source's, by path."""

    def __init__(
        self, kennel: Kennel, server: S3Server, bucket: str, dataset_id: str, digests: Mapping[str, str], root: Path
    ) -> None:
        self._kennel, self._server, self._bucket, self._root = kennel, server, bucket, root
        self._runs = 0
        self.dataset_id, self.digests = dataset_id, digests
        self.lts, self.scratch = root / "lts", root / "scratch"
        self.settings = {"ARCHIVER_TARGET_SIZE_MB": "64", "LTS_FREE_SPACE_PERCENTAGE": "0"}
        self.reset()

    def reset(self) -> None:
        """Empties LTS and scratch: nothing was ever archived."""
        for folder in (self.lts, self.scratch):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    @contextmanager
    def running(self, *options: str, point: Point | None = None, rules: Sequence[Rule] = ()) -> Iterator[Run]:
        """``mover archive`` of the dataset in a process of its own, behind a proxy of its own."""
        self._runs += 1
        folder = self._root / f"run-{self._runs}"
        folder.mkdir()
        proxy = FaultProxy(self._server.endpoint_url)
        proxy.rules += rules
        with self._kennel.portal.wrap_async_context_manager(proxy):
            arguments = ("--json", "archive", self.dataset_id, *options)
            out, err = str(folder / "stdout"), str(folder / "stderr")
            pid = self._kennel.start(Start(arguments, self._environment(proxy.url), out, err, point))
            run = Run(self._kennel, pid, folder, proxy)
            try:
                yield run
            finally:
                run.kill()

    def finish(self, *options: str) -> Run:
        """The same command to its end, undisturbed."""
        with self.running(*options) as run:
            code = run.wait()
        assert code == 0, run.stderr
        return run

    def _environment(self, endpoint_url: str) -> dict[str, str]:
        return self.settings | {
            "MINIO_ENDPOINT": endpoint_url,
            "MINIO_USER": self._server.access_key,
            "MINIO_PASSWORD": self._server.secret_key,
            "MINIO_LANDINGZONE_BUCKET": self._bucket,
            "LTS_STORAGE_ROOT": str(self.lts),
            "ARCHIVER_SCRATCH_FOLDER": str(self.scratch),
        }

    @property
    def datablocks(self) -> Path:
        """Where the datablocks are."""
        return self.lts / dataset_folder(self.dataset_id) / "datablocks"

    def source_paths(self) -> list[str]:
        """Paths of the objects that the landing zone has."""
        prefix = raw_files_prefix(self.dataset_id)
        return [key.removeprefix(prefix) for key in object_keys(self._server, self._bucket, prefix)]

    def manifests(self) -> list[Manifest]:
        """The manifests, by number."""
        found = [msgspec.json.decode(path.read_bytes(), type=Manifest) for path in self.datablocks.glob("*.json")]
        return sorted(found, key=lambda manifest: manifest.number)

    def durable(self) -> Durable:
        """What the files say now. The journal is read as text: the code that wrote it has no say here."""
        windows: set[WindowId] = set()
        for path in self.scratch.glob("journal/*/*.jsonl"):
            windows |= {(int(path.stem), *key) for key in _journaled(path.read_bytes())}
        return Durable(frozenset(windows), frozenset(manifest.number for manifest in self.manifests()))

    def assert_archived(self) -> None:
        """All datablocks are committed and read back, and Python's tarfile finds in them the bytes of the source."""
        manifests = self.manifests()
        assert [manifest.number for manifest in manifests] == list(range(1, manifests[0].datablock_count + 1))
        found: dict[str, str] = {}
        for manifest in manifests:
            path = self.datablocks / manifest.archive_id.rpartition("/")[2]
            assert [evidence.level for evidence in manifest.evidence] == [EvidenceLevel.READ_BACK]
            with path.open("rb") as file:
                assert manifest.digest == f"xxh3_128:{_digest(file)}"
            with tarfile.open(path) as tar:
                for member in tar:
                    content = tar.extractfile(member)
                    assert content is not None
                    found[member.name] = _digest(content)
        assert found == self.digests
        left = [path.name for path in self.datablocks.iterdir() if path.name.endswith(".part")]
        assert left == []
        assert not list(self.scratch.glob("journal/*/*"))


def _journaled(data: bytes) -> set[tuple[int, int]]:
    windows: set[tuple[int, int]] = set()
    file_id = None
    for line in data.split(b"\n")[:-1]:  # what follows the last newline is torn
        entry = json.loads(line)
        match entry["type"]:
            case "begin":
                if entry["file_id"] != file_id:
                    windows.clear()
                file_id = entry["file_id"]
            case "windows":
                windows |= {(index, window) for index, window, _ in entry["windows"]}
            case "renamed":
                file_id = entry["file_id"]
            case "forget":
                windows -= {(index, window) for index, window in entry["windows"]}
    return windows


def _digest(file: IO[bytes]) -> str:
    digest = xxhash.xxh3_128()
    while piece := file.read(_PIECE_BYTES):
        digest.update(piece)
    return digest.hexdigest()


def digest_of(body: bytes) -> str:
    """As ``Scene.digests`` has it."""
    return xxhash.xxh3_128_hexdigest(body)


def make_files(rng: random.Random, sizes: Iterable[int]) -> dict[str, bytes]:
    """Files of these sizes below a few folders, in random order, each with its own bytes."""
    return {f"grid {number % 7}/file-{number:04d}.bin": _random_bytes(rng, size) for number, size in enumerate(sizes)}


def _random_bytes(rng: random.Random, size_bytes: int) -> bytes:
    starts = range(0, size_bytes, _PIECE_BYTES)
    return b"".join(rng.randbytes(min(_PIECE_BYTES, size_bytes - start)) for start in starts)
