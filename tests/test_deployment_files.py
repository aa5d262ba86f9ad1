"""Which files with values the commands of the deployment take."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _commands(*arguments: str, files: str = "") -> str:
    """What ``make up`` would run."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("COMPOSE_", "MAKE", "MFLAGS"))}
    environ = plain | ({"COMPOSE_ENV_FILES": files} if files else {})
    command = ["make", "--dry-run", "up", *arguments]
    return subprocess.run(command, check=True, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=30).stdout


@pytest.mark.parametrize(
    ("arguments", "files", "expected"),
    [
        ((), "", [".env", ".development.env"]),
        (("PRODUCTION=1",), "", [".env"]),
        ((), ".env,own.env", [".env", "own.env"]),
        (("COMPOSE_ENV_FILES=.env,.development.env,own.env",), "", [".env", ".development.env", "own.env"]),
    ],
)
def test_every_command_of_make_takes_the_same_files(
    arguments: tuple[str, ...], files: str, expected: list[str]
) -> None:
    secrets, *commands = _commands(*arguments, files=files).splitlines()
    assert f"COMPOSE_ENV_FILES='{','.join(expected)}' docker/make-secrets" in secrets
    text = " ".join(commands).replace("\\", " ")
    calls = text.split("docker compose")[1:]
    assert len(calls) == 5
    assert [re.findall(r"--env-file (\S+)", call) for call in calls] == [expected] * 5
    assert ("--build" in text) == (".development.env" in expected)


def test_the_unit_takes_them_from_the_variable_of_compose() -> None:
    unit = (ROOT / "docker" / "mover-deployment.service").read_text(encoding="utf-8")
    assert "Environment=COMPOSE_ENV_FILES=.env\nExecStart=/usr/bin/docker compose up -d\n" in unit
