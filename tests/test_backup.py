"""``docker/backup`` and ``docker/restore``, with the database of a deployment on a real engine."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.docker, pytest.mark.timeout(300)]

ROOT = Path(__file__).parent.parent
OPTIONS = ("--env-file", ".env", "--env-file", ".development.env")
SCHEMA = """
create table flow_run (name text);
create table block_document (name text);
create table concurrency_limit_v2 (name text, active_slots integer);
insert into flow_run select 'run ' || number from generate_series(1, 1000) as number;
insert into concurrency_limit_v2 values ('tag:move-to-lts', 2);
"""


class Project:
    """A copy of the project whose deployment has a name of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._name = f"backup-{uuid4().hex[:8]}"
        folder.mkdir()
        for name in ("compose.yaml", ".env", ".development.env"):
            shutil.copy(ROOT / name, folder / name)
        shutil.copytree(ROOT / "docker", folder / "docker")
        self.run("docker/make-secrets")

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        environ = {**os.environ, "COMPOSE_PROJECT_NAME": self._name, "RUNTIME_NETWORK": f"{self._name}-runtime"}
        if os.getuid():
            environ |= {"MOVER_UID": str(os.getuid()), "MOVER_GID": str(os.getgid())}
        return subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=120, cwd=self.folder, env=environ
        )

    def compose(self, *command: str) -> str:
        done = self.run("docker", "compose", *OPTIONS, *command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def sql(self, text: str) -> str:
        return self.compose("exec", "-T", "postgres", "psql", "-qAt", "-U", "prefect", "-d", "prefect", "-c", text)


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    project = Project(tmp_path / "project")
    try:
        yield project
    finally:
        project.compose("--profile", "*", "down", "-v")


def test_a_fresh_database_gets_what_was_backed_up_and_nobody_holds_a_slot(project: Project, tmp_path: Path) -> None:
    file = tmp_path / "backup.dump"
    project.compose("up", "-d", "--wait", "postgres")
    project.sql(SCHEMA)
    done = project.run("docker/backup", *OPTIONS, str(file))
    assert (done.returncode, done.stderr) == (0, "")
    assert file.stat().st_mode & 0o777 == 0o600
    before = file.read_bytes()
    done = project.run("docker/backup", *OPTIONS, str(file))
    assert done.returncode == 2
    assert "is not overwritten" in done.stderr
    assert file.read_bytes() == before

    done = project.run("docker/restore", *OPTIONS, str(file))
    assert done.returncode == 2
    assert "3 tables" in done.stderr

    project.compose("--profile", "*", "down", "-v")
    (project.folder / ".secrets" / "postgrespass.txt").unlink()
    project.run("docker/make-secrets")
    done = project.run("docker/restore", *OPTIONS, str(file))
    assert (done.returncode, done.stdout) == (0, "restored: 1000 flow runs, 0 blocks\n"), done.stderr
    assert project.sql("select count(distinct name) from flow_run") == "1000\n"
    assert project.sql("select * from concurrency_limit_v2") == "tag:move-to-lts|0\n"


def test_a_dump_that_was_cut_off_leaves_the_database_empty(project: Project, tmp_path: Path) -> None:
    file = tmp_path / "backup.dump"
    project.compose("up", "-d", "--wait", "postgres")
    project.sql(SCHEMA)
    assert project.run("docker/backup", *OPTIONS, str(file)).returncode == 0
    project.compose("--profile", "*", "down", "-v")
    file.write_bytes(file.read_bytes()[:-200])
    assert project.run("docker/restore", *OPTIONS, str(file)).returncode != 0
    assert project.sql("select count(*) from information_schema.tables where table_schema = 'public'") == "0\n"


def test_a_backup_that_fails_leaves_no_file(project: Project, tmp_path: Path) -> None:
    file = tmp_path / "backup.dump"
    done = project.run("docker/backup", *OPTIONS, str(file))
    assert done.returncode != 0
    assert list(tmp_path.glob("backup.dump*")) == []
