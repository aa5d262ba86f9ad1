"""A real Prefect server and real workers for tests; a pytest plugin that ``conftest.py`` loads.

``prefect_server``  one for the session: SQLite, a port of its own, the deployment's settings. Tests may restart it.
``PrefectWorker``   a worker for a work pool of type ``process``.

Everything runs as plain processes whose environment names the server's PREFECT_HOME; what is left of them at the end is
found by that name.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self
from urllib.request import ProxyHandler, build_opener

import pytest

from flows.server_settings import FLOW_SETTINGS, SERVER_SETTINGS

__all__ = ["PrefectServer", "PrefectWorker", "free_port"]

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 30.0
_TEST_TIMEOUT_S = 240  # the first test that needs the server waits for its start
_ROOT = Path(__file__).parent.parent


class PrefectServer:
    """A server process: its database, port and settings stay the same over ``stop``, ``kill`` and ``start``."""

    def __init__(self, home: Path, extra: Mapping[str, str] | None = None) -> None:
        self.home = home
        self.port = free_port()
        self.log = home / "server.log"
        self._extra = dict(extra or {})
        self._process: subprocess.Popen[bytes] | None = None
        home.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        """What PREFECT_API_URL has to be."""
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def environ(self) -> dict[str, str]:
        """The whole environment of clients, workers and flow processes."""
        ours = {"PREFECT_HOME": str(self.home), "PREFECT_API_URL": self.url, "PREFECT_CLI_PROMPT": "false"}
        return {**_plain_environ(), **FLOW_SETTINGS, **ours}

    def start(self, timeout_s: float = _START_TIMEOUT_S) -> None:
        """Returns when the server answers; the test fails with the end of its log when it does not come up."""
        assert self._process is None or self._process.poll() is not None, "the server runs"
        environ = {
            **_plain_environ(),
            **SERVER_SETTINGS,
            "PREFECT_HOME": str(self.home),
            # Its default is a folder inside the installed package, which all servers of the machine would share.
            "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(self.home / "ui"),
            # What the browser asks; the default is port 4200.
            "PREFECT_SERVER_UI_API_URL": self.url,
            **self._extra,
        }
        program = [sys.executable, "-m", "tests.prefect_server_process"]
        command = [*program, "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        self._process = _spawn(command, environ, self.log)
        deadline = time.monotonic() + timeout_s
        while not self.healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"the Prefect server does not come up:\n{_end_of(self.log)}")
            time.sleep(0.1)

    def healthy(self) -> bool:
        """Whether the server says that it serves."""
        try:
            with build_opener(ProxyHandler({})).open(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.read() == b"true")
        except OSError:
            return False

    def stop(self) -> None:
        """Ends the server as an administrator does."""
        _end(self._process, signal.SIGTERM)

    def kill(self) -> None:
        """Ends the server as a power failure does."""
        _end(self._process, signal.SIGKILL)

    def processes(self) -> list[int]:
        """Ids of all processes of this server, of its workers and of their flow runs, however deep."""
        mark = f"PREFECT_HOME={self.home}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environ = (folder / "environ").read_bytes().split(b"\0")
                zombie = b") Z " in (folder / "stat").read_bytes()
            except OSError:
                continue
            if mark in environ and not zombie and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        return found

    def kill_all(self) -> None:
        """Ends the server and everything that belongs to it."""
        self.kill()
        for process_id in self.processes():
            _signal(process_id, signal.SIGKILL)

    @contextmanager
    def client_settings(self) -> Iterator[None]:
        """Lets Prefect's client in this process talk to this server, until the end of the block."""
        from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

        with temporary_settings({PREFECT_API_URL: self.url, PREFECT_HOME: self.home}):
            yield
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()  # Prefect leaves connections to the garbage collector: not while another test runs

    def run(
        self, *command: str, timeout_s: float = 120.0, environ: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs ``python <command>`` as a client of this server, in the project's folder, whatever its exit code."""
        return subprocess.run(
            [sys.executable, *command],
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=_ROOT,
            env={**self.environ, **(environ or {})},
            stdin=subprocess.DEVNULL,
        )


class PrefectWorker:
    """A worker for the work pool ``pool``, which has the type ``process``; ends with the block."""

    def __init__(self, server: PrefectServer, pool: str, environ: Mapping[str, str] | None = None) -> None:
        self.pool = pool
        self.log = server.home / f"worker-{pool}.log"
        self._environ = {**server.environ, "PREFECT_WORKER_QUERY_SECONDS": "1", **(environ or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, timeout_s: float = 60.0) -> None:
        """Returns when the worker polls the pool; the test fails with the end of its log when it does not."""
        seen = self.log.stat().st_size if self.log.exists() else 0
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", self.pool, "--type", "process"]
        self._process = _spawn(command, self._environ, self.log)
        deadline = time.monotonic() + timeout_s
        while b"started!" not in self.log.read_bytes()[seen:]:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"the worker of {self.pool} does not come up:\n{_end_of(self.log)}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Ends the worker as an administrator does; it ends its flow runs."""
        _end(self._process, signal.SIGTERM)

    def kill(self) -> None:
        """Ends the worker alone, at once; its flow runs stay."""
        _end(self._process, signal.SIGKILL)

    def flow_processes(self) -> list[int]:
        """Ids of the flow runs' processes that this worker started."""
        children = Path(f"/proc/{self.pid}/task").glob("*/children")
        return [int(word) for path in children for word in path.read_text(encoding="ascii").split()]


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    server = PrefectServer(tmp_path_factory.mktemp("prefect"))
    try:
        server.start()
        yield server
        server.stop()
    finally:
        server.kill_all()


def free_port() -> int:
    """A port of loopback that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _plain_environ() -> dict[str, str]:
    """Of this process, without a profile or settings of Prefect that the shell has."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}


def _spawn(command: list[str], environ: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=dict(environ), cwd=_ROOT
        )


def _end(process: subprocess.Popen[bytes] | None, number: signal.Signals) -> None:
    if process is None or process.poll() is not None:
        return
    process.send_signal(number)
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _signal(process_id: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process_id, number)


def _end_of(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-4000:]


# ----------------------------------------------------------------------------------------------------------- hooks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives tests on the server the time that its start takes."""
    for item in items:
        if "prefect_server" in getattr(item, "fixturenames", ()) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(_TEST_TIMEOUT_S))
