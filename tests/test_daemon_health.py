"""Health: what hangs is named and holds up nothing, a mount that is gone is no empty share, a blocked loop is seen."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import httpx
import pytest

from mover.daemon_health import Blocking, DependencyState, Finding, HealthMonitor, Probe
from mover.daemon_notify import Notifier
from mover.daemon_prefect import DEPLOYMENTS
from mover.daemon_probes import LtsProbe, catalogue_probe, open_probes, scratch_probe
from mover.daemon_watchdog import LoopWatchdog
from mover.engine import EngineConfig
from mover.errors import LtsError, MissingMountError
from mover.parts import Buckets
from mover.scicat import SciCatAccess
from mover.settings_rules import Secret
from mover.streams.lts_mount import free_space
from mover.streams.s3_calls import S3Endpoint
from tests.lts_mounts import small_mount
from tests.prefect_servers import PrefectServer
from tests.scicat_fake.server import ScicatServer
from tests.servers import S3Server, fresh_bucket

pytestmark = pytest.mark.anyio

PATIENCE_S = 20.0


async def _until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - polled, with a deadline
            await anyio.sleep(0.01)


@asynccontextmanager
async def _watching(*probes: Probe) -> AsyncIterator[HealthMonitor]:
    monitor = HealthMonitor(probes, secrets=("s3cret-key",))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(monitor.watch)
        yield monitor
        tasks.cancel_scope.cancel()


async def _state(monitor: HealthMonitor, name: str, state: DependencyState) -> str:
    """Waits for the state; returns the detail."""

    def found() -> bool:
        view = monitor.view(name)
        return view is not None and view.state == state

    await _until(found)
    view = monitor.view(name)
    assert view is not None
    return view.detail


def _probe(name: str, call: Callable[[], object], **more: object) -> Probe:
    async def look() -> Finding:
        call()
        return Finding("fine")

    return Probe(name, look, deadline_s=0.2, every_s=0.01, **more)  # type: ignore[arg-type]


class Notifications:
    """A service manager's socket, and what came in there."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    def taken(self) -> list[str]:
        messages = []
        while True:
            try:
                messages.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                return messages

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Notifications]:
    notifications = Notifications(tmp_path / "notify")
    yield notifications
    notifications.close()


# ---------------------------------------------------------------------------------------------------------- the monitor
async def test_a_probe_that_hangs_is_named_has_one_thread_and_holds_up_nobody() -> None:
    release = threading.Event()
    calls = []

    def hang() -> Finding:
        calls.append(1)
        release.wait()
        return Finding("back")

    tried = []
    hanging = Probe("lts", Blocking(hang, 0.1), deadline_s=0.1, every_s=0.01)
    async with _watching(hanging, _probe("s3", lambda: tried.append(1))) as monitor:
        detail = await _state(monitor, "lts", "hanging")
        count = len(tried)
        await _until(lambda: len(tried) > count + 20)
        assert len(calls) == 1
        readiness = monitor.readiness()
        assert not readiness.ready
        assert readiness.summary.startswith("lts hanging: no answer within")
        assert detail.startswith("no answer within")
        assert [view.state for view in readiness.dependencies] == ["hanging", "ok"]
        release.set()
        assert await _state(monitor, "lts", "ok") == "back"
        assert monitor.readiness().ready


async def test_failures_are_told_without_secrets_and_with_the_last_success() -> None:
    failing = [False]

    def look() -> None:
        if failing[0]:
            raise LtsError("stat", "/lts", "refused for s3cret-key\nsecond line")

    async with _watching(_probe("lts", look)) as monitor:
        await _state(monitor, "lts", "ok")
        view = monitor.view("lts")
        assert view is not None
        assert view.latency_s is not None
        worked = view.last_success_at
        failing[0] = True
        detail = await _state(monitor, "lts", "failed")
        assert "s3cret-key" not in detail
        assert "\n" not in detail
        view = monitor.view("lts")
        assert view is not None
        assert view.last_success_at >= worked
        assert view.since >= view.last_success_at


async def test_what_is_not_required_leaves_the_daemon_ready_and_what_was_not_tried_does_not() -> None:
    def fail() -> None:
        raise ConnectionRefusedError

    monitor = HealthMonitor([_probe("s3", lambda: None)])
    assert not monitor.readiness().ready
    async with _watching(_probe("prefect", fail, required=False), _probe("s3", lambda: None)) as monitor:
        await _state(monitor, "prefect", "failed")
        await _state(monitor, "s3", "ok")
        assert monitor.readiness().ready
        assert "prefect failed" in monitor.readiness().summary


async def test_an_unexpected_error_of_a_probe_is_a_finding_too() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    async with _watching(_probe("s3", fail)) as monitor:
        assert (await _state(monitor, "s3", "failed")).startswith("ZeroDivisionError")


# ---------------------------------------------------------------------------------------------------------- the folders
def test_a_missing_mount_is_not_taken_for_an_empty_share(tmp_path: Path) -> None:
    probe = LtsProbe(tmp_path / "lts", tmp_path / "daemon", 20)
    with small_mount(tmp_path / "lts"):
        assert "tmpfs" in probe().detail
        assert "tmpfs" in LtsProbe(tmp_path / "lts", tmp_path / "daemon", 20)().detail
        subprocess.run(["umount", str(tmp_path / "lts")], check=True)
        try:
            for later in (probe, LtsProbe(tmp_path / "lts", tmp_path / "daemon", 20)):  # as after a restart
                with pytest.raises(MissingMountError, match=r"tmpfs .*is expected there, and found is .*lts-mount"):
                    later()
            with pytest.raises(MissingMountError, match="is the share mounted"):
                free_space(tmp_path / "lts", "tmpfs")
        finally:
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "lts")], check=True)


def test_space_below_the_floor_is_a_drawback_and_no_failure(tmp_path: Path) -> None:
    (tmp_path / "lts").mkdir()
    probe = LtsProbe(tmp_path / "lts", tmp_path / "daemon", 100)
    finding = probe()
    assert finding.state == "degraded"
    assert "archiving waits for space" in finding.detail
    assert probe.reading is not None
    assert probe.floor_bytes == probe.reading.total_bytes


def test_a_share_that_nobody_may_write_fails(tmp_path: Path) -> None:
    with small_mount(tmp_path / "lts"):
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "lts")], check=True)
        with pytest.raises(LtsError, match="EROFS"):
            LtsProbe(tmp_path / "lts", tmp_path / "daemon", 20)()


def test_the_scratch_folder_is_written(tmp_path: Path) -> None:
    assert str(tmp_path / "daemon") in scratch_probe(tmp_path / "daemon").detail
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        scratch_probe(tmp_path / "file" / "daemon")


# --------------------------------------------------------------------------------------------------------- the services
def _config(server: S3Server, folder: Path, buckets: Buckets, *, staging: bool = False) -> EngineConfig:
    endpoint = S3Endpoint(server.endpoint_url, server.region, server.access_key, server.secret_key)
    return EngineConfig(s3=endpoint, buckets=buckets, lts_root=folder, scratch_folder=folder, staging=staging)


async def _found(
    config: EngineConfig, name: str, folder: Path, prefect_url: str = "", prefect_auth: str = ""
) -> tuple[str, str]:
    lts = LtsProbe(folder, folder / "daemon", 0)
    auth = Secret(prefect_auth) if prefect_auth else None
    async with open_probes(config, lts, folder, prefect_url=prefect_url, prefect_auth=auth) as probes:
        (probe,) = (probe for probe in probes if probe.name == name)
        async with _watching(probe) as monitor:
            await _until(lambda: monitor.readiness().dependencies[0].state != "unknown")
            view = monitor.readiness().dependencies[0]
            return view.state, view.detail


async def test_every_bucket_is_asked_for(moto_server: S3Server, tmp_path: Path) -> None:
    with fresh_bucket(moto_server) as first, fresh_bucket(moto_server) as second:
        buckets = Buckets(first, "not-there", second)
        state, detail = await _found(_config(moto_server, tmp_path, buckets), "s3", tmp_path)
        assert state == "ok"
        assert "not-there is not there, and not used" in detail
        state, detail = await _found(_config(moto_server, tmp_path, buckets, staging=True), "s3", tmp_path)
        assert state == "failed"
        assert "not-there" in detail


async def test_services_that_are_away_fail_and_say_where_they_should_be(tmp_path: Path) -> None:
    with socket.socket() as held:  # bound, and nobody listens
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        away = S3Server("away", url, "test", "test-secret")
        buckets = Buckets("landing-zone", "staging", "retrieval")
        state, _ = await _found(_config(away, tmp_path, buckets), "s3", tmp_path)
        assert state == "failed"
        state, detail = await _found(_config(away, tmp_path, buckets), "prefect", tmp_path, prefect_url=f"{url}/api")
        assert state == "failed"
        assert "Connect" in detail


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_prefect_works_when_it_lets_the_daemon_in_and_has_what_jobs_are_started_with(tmp_path: Path) -> None:
    server = PrefectServer(tmp_path / "prefect", {"PREFECT_SERVER_API_AUTH_STRING": "admin:the-secret"})
    nowhere = S3Server("away", "http://127.0.0.1:9", "test", "test-secret")
    config = _config(nowhere, tmp_path, Buckets("landing-zone", "staging", "retrieval"))

    async def found(auth: str) -> tuple[str, str]:
        """What the probe finds of a server that is not busy with its SQLite for the moment."""
        while True:
            state, detail = await _found(config, "prefect", tmp_path, server.url, auth)
            if "status 503" not in detail:
                return state, detail

    async def post(client: httpx.AsyncClient, path: str, body: dict[str, str]) -> str:
        while (reply := await client.post(path, json=body)).status_code == httpx.codes.SERVICE_UNAVAILABLE:  # noqa: ASYNC110 - it is the server that knows
            await anyio.sleep(0.2)
        assert reply.is_success, reply.text
        return str(reply.json()["id"])

    try:
        await anyio.to_thread.run_sync(server.start)
        for auth in ("", "admin:wrong"):
            state, detail = await found(auth)
            assert (state, "PREFECT_API_AUTH_STRING" in detail, "401" in detail) == ("failed", True, True)
            assert "wrong" not in detail
        state, detail = await found("admin:the-secret")
        assert (state, "archive_datasetlist/datasets_archival" in detail) == ("failed", True)
        assert "python -m flows.deploy" in detail
        async with httpx.AsyncClient(base_url=server.url, auth=("admin", "the-secret"), timeout=30) as client:
            for names in DEPLOYMENTS.values():
                flow, _, deployment = names.partition("/")
                flow_id = await post(client, "/flows/", {"name": flow})
                await post(client, "/deployments/", {"name": deployment, "flow_id": flow_id})
        assert await found("admin:the-secret") == ("ok", server.url)
        assert (await found("admin:wrong"))[0] == "failed"
    finally:
        await anyio.to_thread.run_sync(server.kill_all)


async def test_the_catalogue_is_logged_in_to(scicat_server: ScicatServer) -> None:
    access = SciCatAccess(scicat_server.url, scicat_server.user, Secret(scicat_server.password))
    async with catalogue_probe(access) as probe, _watching(probe) as monitor:
        assert scicat_server.url in await _state(monitor, "catalogue", "ok")
    wrong = SciCatAccess(scicat_server.url, scicat_server.user, Secret("wrong"))
    async with catalogue_probe(wrong) as probe, _watching(probe) as monitor:
        assert "wrong" not in await _state(monitor, "catalogue", "failed")


# ------------------------------------------------------------------------------------------------------------- the loop
def _block(seconds: float) -> None:
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        pass


@pytest.mark.slow
async def test_a_blocked_loop_is_seen_from_outside_with_where_it_stands(
    tmp_path: Path, manager: Notifications, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "300000"})
    watchdog = LoopWatchdog(notifier, blocked_after_s=1.0)
    lags: list[float] = []
    watchdog.on_lag = lags.append
    with caplog.at_level(logging.WARNING, "mover.daemon_watchdog"):
        async with watchdog.watching():
            await _until(lambda: len(manager.taken()) > 0)
            assert watchdog.state().blocked == 0
            _block(4)
            last = manager.taken()
            assert 0 < len(last) < 16  # none while it was blocked
            await _until(lambda: watchdog.state().last_blocked_s > 3 and watchdog.state().blocked_s > 3)
            manager.taken()
            await _until(lambda: len(manager.taken()) > 0)
    state = watchdog.state()
    assert state.blocked >= 1  # a busy machine may stop the loop by itself
    assert "_block" in state.last_blocked_in
    assert state.worst_lag_s > 3
    assert max(lags) > 3
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert "while time.monotonic() < end_s" in told or "pass" in told
    assert re.search(r"goes on, after ([3-9]|\d\d)\.", told)


STOPPED = """
import asyncio, os, signal
from mover.daemon_notify import Notifier
from mover.daemon_watchdog import LoopWatchdog

async def main():
    watchdog = LoopWatchdog(Notifier({}), blocked_after_s=1.0)
    async with watchdog.watching():
        await asyncio.sleep(1)
        os.kill(os.getpid(), signal.SIGSTOP)
        await asyncio.sleep(2)
    print(watchdog.state().blocked)

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_process_that_stood_still_has_no_blocked_loop() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        os.waitpid(process.pid, os.WUNTRACED)  # it has stopped itself
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        said, told = process.communicate(timeout=30)
    assert said == "0\n"
    assert re.search(r"the whole process stood still for ([2-9]|\d\d)\.", told)


async def test_the_service_manager_is_told_and_without_one_nothing_happens(
    tmp_path: Path, manager: Notifications
) -> None:
    Notifier({}).ready("x")
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).ready("x")
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"})
    assert notifier.watchdog_s == 0  # for another process
    notifier.ready("listening")
    notifier.reloading()
    notifier.stopping("going")
    notifier.extend(1.5)
    ready, reloading, stopping, extended = manager.taken()
    assert ready == "READY=1\nSTATUS=listening"
    assert reloading.startswith("RELOADING=1\nMONOTONIC_USEC=")
    assert stopping == "STOPPING=1\nSTATUS=going"
    assert extended == "EXTEND_TIMEOUT_USEC=1500000"
