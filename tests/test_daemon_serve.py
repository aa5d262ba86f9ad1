"""The daemon as a process: its start, its signals, who gets in, and what becomes of work when it goes."""

from __future__ import annotations

import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio.to_thread
import httpx
import pytest

from tests.certificates import server_context
from tests.daemon_process import DaemonProcess, World, free_port, until, world
from tests.faults import FaultProxy
from tests.lts_mounts import hung_mount
from tests.scicat_fake.server import ScicatServer
from tests.servers import S3Server

DATASET = "20.500.11935/a"
READER, OPERATOR = "reader-token-0123456789", "operator-token-0123456789"


@pytest.fixture
def place(tmp_path: Path, moto_server: S3Server) -> Iterator[World]:
    with world(tmp_path, moto_server) as made:
        yield made


def _mover(place: World, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mover.cli", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
        env=place.environ | settings,
    )


def _token_file(place: World, *lines: str) -> Path:
    path = place.folder / "tokens"
    path.write_text("\n".join(lines))
    path.chmod(0o600)
    return path


def test_it_serves_from_the_first_request_to_an_orderly_end(place: World) -> None:
    place.put(DATASET, {"x": b"1" * 5000, "y": b""})
    notifications = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notifications.bind(str(place.folder / "notify"))
    notifications.setblocking(False)
    path = place.folder / "mover.sock"
    settings = {"NOTIFY_SOCKET": str(place.folder / "notify"), "MOVER_SOCKET": str(path)}
    with notifications, place.daemon(**settings) as daemon:
        daemon.until_ready()
        assert notifications.recv(1000).startswith(b"READY=1\n")
        assert daemon.until_job(daemon.order("archive", DATASET), "done", "failed")["state"] == "done"
        assert daemon.metric('mover_objects_total{direction="archive"}') == 2
        assert daemon.metric('mover_datasets_ended_total{end="done",kind="archive"}') == 1
        assert daemon.metric('mover_limit_grants_total{limit="MOVE_TO_LTS_LIMIT"}') == 1
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), timeout=30) as client:
            assert client.get("http://localhost/livez").json()["alive"] is True
        assert _mover(place, "health", "--timeout", "25", MOVER_SOCKET=str(path)).returncode == 0
        for where in (f"unix:{path}", f"unix://{path}", daemon.url):
            assert _mover(place, "health", "--timeout", "25", MOVER_URL=where).returncode == 0
        elsewhere = _mover(place, "--url", "unix:/nobody/is/here", "health", "--timeout", "25")  # not this host's own
        assert (elsewhere.returncode, "no answer" in elsewhere.stderr) == (1, True)
        ready = _mover(place, "health", "--ready", "--timeout", "25")
        assert ready.returncode == 0
        assert ready.stdout.startswith("ready: ")
        assert daemon.stop() == 0
        assert "stopped in order" in daemon.log
        assert "ERROR" not in daemon.log
        assert place.server.secret_key not in daemon.log
        assert any(b"STOPPING=1" in notifications.recv(1000) for _ in range(5))
    assert not path.exists()
    gone = _mover(place, "health", "--timeout", "25")
    assert gone.returncode == 1
    assert "no answer" in gone.stderr


@pytest.mark.anyio
@pytest.mark.slow
async def test_its_health_is_told_through_a_reverse_proxy_with_tls(place: World) -> None:
    tls, authority = server_context(place.folder)

    async def health(url: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return await anyio.to_thread.run_sync(
            lambda: _mover(place, "--url", url, "health", "--timeout", "25", **settings)
        )

    with place.daemon() as daemon:
        daemon.until_alive()
        async with FaultProxy(daemon.url, tls) as proxy:
            told = await health(proxy.url, SSL_CERT_FILE=str(authority))
            assert (told.returncode, '"alive":true' in told.stdout) == (0, True)
            assert (await health(f"{proxy.url}/below/", SSL_CERT_FILE=str(authority))).returncode == 1
            assert [item.target for item in proxy.seen] == ["/livez", "/below/livez"]
            unknown = await health(proxy.url)
            assert (unknown.returncode, "CERTIFICATE_VERIFY_FAILED" in unknown.stderr) == (1, True)
    refused = await health("ftp://somewhere")
    assert (refused.returncode, "http(s)://host:port or unix:/path" in refused.stderr) == (2, True)


@pytest.mark.slow
def test_nobody_from_elsewhere_gets_in_without_a_token_and_a_port_has_one_daemon(place: World) -> None:
    refused = _mover(place, "serve", MOVER_HOST="0.0.0.0")  # noqa: S104 - refused
    assert refused.returncode == 2
    assert "MOVER_HOST" in refused.stderr
    assert "MOVER_TOKEN_FILE is required" in refused.stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(place.environ["MOVER_PORT"])))
        taken.listen()
        in_use = _mover(place, "serve")
    assert in_use.returncode == 1
    assert "cannot listen on 127.0.0.1" in in_use.stderr


@pytest.mark.slow
def test_the_page_is_read_with_a_session_and_nothing_can_be_ordered_with_it(place: World) -> None:
    tokens = _token_file(place, f"eve:read:{READER}", f"olga:operate:{OPERATOR}")
    with place.daemon(MOVER_TOKEN_FILE=str(tokens), MOVER_HOST="0.0.0.0") as daemon:  # noqa: S104 - behind tokens
        daemon.until_ready()
        client = daemon.client
        assert client.get("/").headers["location"] == "/login"
        assert client.get("/").status_code == 303
        assert client.get("/metrics").status_code == 401
        assert client.get("/page/mover.css").status_code == 200
        assert client.get("/login").status_code == 200
        assert client.post("/login", data={"token": "wrong"}).status_code == 403
        assert client.post("/login", data={"token": "x" * 20_000}).status_code == 413  # anybody may send one
        entered = client.post("/login", data={"token": OPERATOR})
        assert entered.status_code == 303
        cookie = entered.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert OPERATOR not in cookie
        page = client.get("/")
        assert page.status_code == 200
        assert "log out" in page.text
        assert "'unsafe" not in page.headers["content-security-policy"]
        order = {"kind": "plan", "dataset_ids": [DATASET]}
        assert client.post("/v1/jobs", json=order).status_code == 401
        assert client.post("/v1/jobs", json=order, headers={"Authorization": f"Bearer {READER}"}).status_code == 403
        assert client.post("/v1/jobs", json=order, headers={"Authorization": f"Bearer {OPERATOR}"}).status_code == 202
        _token_file(place, f"eve:read:{READER}")  # Olga leaves, while she looks on
        with client.stream("GET", "/v1/events", headers={"Authorization": f"Bearer {OPERATOR}"}) as events:
            daemon.signal(signal.SIGHUP)
            events.read()  # to its end
        until(lambda: client.get("/").status_code == 303)
        assert client.post("/login", data={"token": READER}).status_code == 303
        assert client.get("/").status_code == 200
        assert client.post("/login/leave").status_code == 303
        assert client.get("/").status_code == 303
        assert READER not in daemon.log


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_limits_are_read_again_and_a_bad_configuration_changes_nothing(place: World) -> None:
    config = place.folder / "mover.toml"
    config.write_text("[limits]\nMOVE_TO_LTS_LIMIT = 2\n")
    with place.daemon("--config", str(config)) as daemon:
        daemon.until_ready()
        config.write_text("[limits]\nMOVE_TO_LTS_LIMIT = 5\n[mover]\nMOVER_BUFFER_MB = 64\n")
        daemon.signal(signal.SIGHUP)
        until(lambda: daemon.metric('mover_limit_slots{limit="MOVE_TO_LTS_LIMIT"}') == 5)
        assert "MOVE_TO_LTS_LIMIT: 5 instead of 2" in daemon.log
        until(lambda: "MOVER_BUFFER_MB=64 takes effect with the next start" in daemon.log)
        config.write_text("[limits]\nMOVE_TO_LTS_LIMIT = 0\n")
        daemon.signal(signal.SIGHUP)
        until(lambda: daemon.dependency("configuration")["state"] == "degraded")
        assert "MOVE_TO_LTS_LIMIT=0" in daemon.dependency("configuration")["detail"]
        assert "what was read before stays in force" in daemon.log
        assert daemon.metric('mover_limit_slots{limit="MOVE_TO_LTS_LIMIT"}') == 5
        assert daemon.process.poll() is None
        assert daemon.client.patch("/v1/limits", json={"MOVE_TO_LTS_LIMIT": 3}).status_code == 200
        config.write_text("[limits]\nMOVE_TO_LTS_LIMIT = 5\nVERIFY_LTS_LIMIT = 4\n")
        daemon.signal(signal.SIGHUP)
        until(lambda: daemon.metric('mover_limit_slots{limit="VERIFY_LTS_LIMIT"}') == 4)
        assert daemon.metric('mover_limit_slots{limit="MOVE_TO_LTS_LIMIT"}') == 3  # the file says what it said before
        assert daemon.dependency("configuration")["state"] == "ok"


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_work_that_does_not_end_in_time_is_left_and_goes_on_with_the_next_start(place: World) -> None:
    place.put(DATASET, {"x": b"1" * 5000})
    with place.daemon(LTS_FREE_SPACE_PERCENTAGE="99", MOVER_DRAIN_S="12") as daemon:  # it waits for space, and waits
        daemon.until_ready()
        job_id = daemon.order("archive", DATASET)
        until(lambda: daemon.metric("mover_lts_waiting") == 1)
        daemon.signal(signal.SIGTERM)
        until(lambda: daemon.client.get("/readyz").status_code == 503)
        assert daemon.dependency("intake")["state"] == "failed"
        refused = daemon.client.post("/v1/jobs", json={"kind": "plan", "dataset_ids": [DATASET]})
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert daemon.client.get("/livez").status_code == 200
        assert daemon.exit_code() == 0
    with place.daemon() as daemon:
        daemon.until_ready()
        assert daemon.until_job(job_id, "done", "failed")["state"] == "done"


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_second_signal_ends_it_at_once_and_loses_nothing(place: World) -> None:
    place.put(DATASET, {"x": b"1" * 5000})
    with place.daemon(LTS_FREE_SPACE_PERCENTAGE="99", MOVER_DRAIN_S="600") as daemon:
        daemon.until_ready()
        job_id = daemon.order("archive", DATASET)
        until(lambda: daemon.metric("mover_lts_waiting") == 1)
        daemon.signal(signal.SIGTERM)
        until(lambda: "have 600 s to end" in daemon.log)
        daemon.signal(signal.SIGTERM)
        assert daemon.exit_code(60) == 130
    with place.daemon() as daemon:
        daemon.until_ready()
        assert daemon.until_job(job_id, "done", "failed")["state"] == "done"


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_without_the_lts_it_comes_up_says_so_and_goes_on_once_it_is_there(place: World) -> None:
    place.put(DATASET, {"x": b"1" * 5000})
    place.lts.rmdir()
    with place.daemon() as daemon:
        daemon.until_alive()
        until(lambda: daemon.dependency("lts")["state"] == "failed")
        assert "is the share mounted?" in daemon.dependency("lts")["detail"]
        assert daemon.dependency("engine")["state"] == "unknown"
        assert daemon.client.get("/").status_code == 200
        refused = daemon.client.post("/v1/jobs", json={"kind": "plan", "dataset_ids": [DATASET]})
        assert refused.status_code == 503
        assert daemon.client.get("/v1/events").status_code == 503
        assert _mover(place, "health", "--timeout", "25").returncode == 0
        assert _mover(place, "health", "--ready", "--timeout", "25").returncode == 1
        place.lts.mkdir()
        daemon.until_ready()
        assert daemon.until_job(daemon.order("archive", DATASET), "done", "failed")["state"] == "done"
        daemon.process.kill()
        daemon.process.wait()
    place.lts.rename(place.folder / "moved")
    with place.daemon() as daemon:
        daemon.until_alive()
        assert daemon.stop() == 0  # also before there is an engine


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_catalogue_is_needed_where_it_is_configured_and_prefect_is_not(
    place: World, scicat_server: ScicatServer
) -> None:
    settings = {
        "SCICAT_ENDPOINT": scicat_server.url,
        "SCICAT_USER": scicat_server.user,
        "SCICAT_PASSWORD": scicat_server.password,
    }
    with place.daemon(**settings, PREFECT_API_URL=f"http://127.0.0.1:{free_port()}/api") as daemon:
        daemon.until_ready()
        until(lambda: daemon.dependency("prefect")["state"] == "failed")
        assert daemon.dependency("catalogue")["state"] == "ok"
        assert daemon.client.get("/readyz").status_code == 200
        assert daemon.client.post("/v1/scicat/jobs", json={"id": "1", "type": "other"}).json()["action"] == "ignored"
        assert daemon.stop() == 0
        assert scicat_server.password not in daemon.log
    with place.daemon(**settings | {"SCICAT_PASSWORD": "wrong"}) as daemon:  # and no Prefect: jobs run in the daemon
        daemon.until_alive()
        until(lambda: daemon.dependency("catalogue")["state"] == "failed")
        assert daemon.client.get("/readyz").status_code == 503
        assert daemon.stop() == 0


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_share_that_hangs_is_named_while_everything_else_goes_on(place: World) -> None:
    for name in ("before", "during", "after"):
        place.put(f"20.500.11935/{name}", {"x": b"1" * 5000})
    with place.daemon() as daemon:
        daemon.until_ready()
        before = daemon.order("archive", "20.500.11935/before")
        assert daemon.until_job(before, "done", "failed")["state"] == "done"
        with hung_mount(place.lts):
            stuck = daemon.order("archive", "20.500.11935/during")
            until(lambda: daemon.dependency("lts")["state"] == "hanging")
            assert [view["name"] for view in _not_well(daemon)] == ["lts"]
            assert daemon.client.get("/readyz").status_code == 503
            for path in ("/livez", "/", "/readyz", "/metrics", "/v1/jobs"):
                assert min(_answer_s(daemon, path) for _ in range(3)) < 1, path
            for _ in range(3):  # jobs that need no share are done meanwhile
                plan = daemon.order("plan", "20.500.11935/after")
                assert daemon.until_job(plan, "done", "failed")["state"] == "done"
            assert daemon.metric('mover_dependency_state{dependency="lts",state="hanging"}') == 1
            assert _threads(daemon.process.pid) < 40
            assert daemon.job(stuck)["state"] not in {"done", "failed"}
        until(lambda: daemon.dependency("lts")["state"] == "ok")
        daemon.until_ready()
        after = daemon.order("archive", "20.500.11935/after")
        assert daemon.until_job(after, "done", "failed")["state"] == "done"
        assert daemon.until_job(stuck, "done", "failed")["state"] == "done"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_share_that_hangs_does_not_keep_the_daemon_from_stopping(place: World) -> None:
    place.put(DATASET, {"x": b"1" * 5000})
    with place.daemon() as daemon:
        daemon.until_ready()
        with hung_mount(place.lts):
            daemon.order("archive", DATASET)
            until(lambda: daemon.dependency("lts")["state"] == "hanging")
            began_s = time.monotonic()
            daemon.signal(signal.SIGTERM)
            assert daemon.exit_code(60) in {0, 1}
            assert time.monotonic() - began_s < 45


def _answer_s(daemon: DaemonProcess, path: str) -> float:
    began_s = time.monotonic()
    assert daemon.client.get(path).status_code in {200, 503}
    return time.monotonic() - began_s


def _not_well(daemon: DaemonProcess) -> list[dict[str, Any]]:
    views: list[dict[str, Any]] = daemon.client.get("/readyz").json()["dependencies"]
    return [view for view in views if view["state"] not in {"ok", "degraded"}]


def _threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))
