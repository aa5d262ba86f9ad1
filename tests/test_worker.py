"""The worker of a deployment: hands over the server's credentials, waits for its pool, tells whether it polls."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from socket import gethostname
from urllib.request import urlopen

import anyio
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate

from flows.worker import hand_over, main
from tests.prefect_servers import PrefectServer, free_port

ROOT = Path(__file__).parent.parent
POOL = "worker-of-a-deployment"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "shared"
    folder.mkdir()
    secret = tmp_path / "secret"
    secret.write_text("admin:s3cret\n", encoding="utf-8")
    return {"RUNTIME_SECRETS_FOLDER": str(folder), "PREFECT_API_AUTH_STRING_FILE": str(secret)}


# ------------------------------------------------------------------------------------------------------- credentials
def test_the_secret_is_handed_over_to_its_owner_alone(environ: dict[str, str]) -> None:
    target = hand_over(environ)
    assert target == Path(environ["RUNTIME_SECRETS_FOLDER"]) / "prefectauth"
    assert target.read_text(encoding="utf-8") == "admin:s3cret\n"
    assert target.stat().st_mode & 0o777 == 0o600


def test_a_new_secret_takes_the_place_of_the_old_one(environ: dict[str, str]) -> None:
    target = hand_over(environ)
    assert target is not None
    Path(environ["PREFECT_API_AUTH_STRING_FILE"]).write_text("admin:new", encoding="utf-8")
    assert hand_over(environ) == target
    assert target.read_text(encoding="utf-8") == "admin:new"


@pytest.mark.parametrize("name", ["RUNTIME_SECRETS_FOLDER", "PREFECT_API_AUTH_STRING_FILE"])
def test_nothing_is_handed_over_where_nothing_is_set(environ: dict[str, str], name: str) -> None:
    folder = Path(environ["RUNTIME_SECRETS_FOLDER"])
    assert hand_over({**environ, name: ""}) is None
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["RUNTIME_SECRETS_FOLDER", "PREFECT_API_AUTH_STRING_FILE"])
def test_a_worker_does_not_start_without_the_secret_that_it_shall_hand_over(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for key, value in {**environ, name: "/nowhere/at-all"}.items():
        monkeypatch.setenv(key, value)
    assert main(["--pool", POOL]) == 2
    assert "/nowhere/at-all" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- the worker
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_waits_for_its_pool_then_polls_and_ends_when_it_is_told(
    prefect_server: PrefectServer, environ: dict[str, str], tmp_path: Path
) -> None:
    port, log = str(free_port()), tmp_path / "worker.log"
    given = {**prefect_server.environ, **environ, "PREFECT_WORKER_WEBSERVER_PORT": port}
    # The credentials are the deployment's: this server asks for none.
    command = [sys.executable, "-m", "flows.worker", "--pool", POOL]
    # Interrupts are ignored, as below a shell's `&`.
    start = partial(subprocess.Popen, command, env=given, cwd=ROOT, preexec_fn=_ignore_interrupts)
    with log.open("wb") as out, start(stdout=out, stderr=out) as process:
        try:
            _until(lambda: f"there is no work pool '{POOL}' yet" in log.read_text(encoding="utf-8"), log)
            assert not _healthy(port)
            with prefect_server.client_settings():
                anyio.run(_make_pool)
            _until(lambda: _healthy(port), log)
            done = prefect_server.run("-m", "flows.worker", "--check", environ={"PREFECT_WORKER_WEBSERVER_PORT": port})
            assert (done.returncode, done.stdout) == (0, "200\n")
            _until(lambda: f"Worker '{POOL} on {gethostname()}' started!" in log.read_text(encoding="utf-8"), log)
        finally:
            process.terminate()
        assert process.wait(60) == 0
    with prefect_server.client_settings():
        anyio.run(_delete_pool)
    assert (Path(environ["RUNTIME_SECRETS_FOLDER"]) / "prefectauth").exists()


def test_a_worker_that_does_not_poll_is_told_by_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_WORKER_WEBSERVER_PORT", str(free_port()))
    assert main(["--check"]) == 1
    assert "the worker does not poll" in capsys.readouterr().out


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _healthy(port: str) -> bool:
    with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
        return bool(reply.status == 200)
    return False


def _until(condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, log.read_text(encoding="utf-8")[-3000:]
        time.sleep(0.2)


async def _make_pool() -> None:
    async with get_client() as client:
        await client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))


async def _delete_pool() -> None:
    async with get_client() as client:
        await client.delete_work_pool(POOL)
