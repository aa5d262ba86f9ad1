"""The Prefect server on PostgreSQL, as deployments have it, is configured like the one on SQLite."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.settings import SECRET_BLOCKS
from tests.prefect_servers import PrefectServer, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SAMPLE = Path(__file__).parent.parent / "docker" / "vars.toml"
PASSWORD = "p@ss/w:rd"


@pytest.fixture
def database() -> Iterator[dict[str, str]]:
    """A PostgreSQL server of its own; gives the settings that a Prefect server needs for it."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        explain = "PostgreSQL is not installed (Debian: apt-get install postgresql)"
        pytest.fail(explain) if os.environ.get("CI") else pytest.skip(explain)
    folder, port = Path(tempfile.mkdtemp(prefix="mover-test-pg-", dir="/tmp")), free_port()
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if as_user:
        shutil.chown(folder, "postgres")
    control = [*as_user, str(programs[-1].parent / "pg_ctl"), "--pgdata", str(folder / "data"), "--wait"]

    def run(*command: str) -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder, timeout=120)

    (folder / "password").write_text(PASSWORD, encoding="utf-8")
    try:
        options = ["--username=prefect", f"--pwfile={folder / 'password'}", "--auth=scram-sha-256", "--encoding=UTF8"]
        run(*as_user, str(programs[-1]), "--no-sync", *options, str(folder / "data"))
        settings = f"-c port={port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        run(*control, "--log", str(folder / "log"), "--options", settings, "start")
        prefix = "PREFECT_SERVER_DATABASE_"
        where = {"DRIVER": "postgresql+asyncpg", "HOST": "127.0.0.1", "PORT": str(port), "NAME": "postgres"}
        yield {f"{prefix}{k}": v for k, v in {**where, "USER": "prefect", "PASSWORD": PASSWORD}.items()}
    finally:
        subprocess.run([*control, "--mode", "immediate", "stop"], check=False, cwd="/", stdout=subprocess.DEVNULL)
        shutil.rmtree(folder)


def test_a_server_on_postgres_is_configured_once(database: dict[str, str], tmp_path: Path) -> None:
    files = {}
    for name in SECRET_BLOCKS:
        (tmp_path / name).write_text("secret", encoding="utf-8")
        files[f"{name}_FILE"] = str(tmp_path / name)
    server = PrefectServer(tmp_path / "prefect", database)
    try:
        server.start()
        command = ("-m", "flows.configure", "--config", str(SAMPLE), "--json")
        first = server.run(*command, environ=files)
        assert first.returncode == 0, first.stderr
        assert json.loads(first.stdout)["differs"]
        assert not (server.home / "prefect.db").exists()
        second = server.run(*command, "--check", environ=files)
        assert (second.returncode, second.stderr) == (0, "")
        assert {item["state"] for item in json.loads(second.stdout)["items"]} == {"unchanged"}
    finally:
        server.kill_all()
