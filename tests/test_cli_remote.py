"""Commands that a daemon carries out: real processes on both sides, the results and exit codes of commands run here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from mover.errors import ExitCode
from mover.model import archive_id
from mover.streams.lts import LtsFolder
from tests.daemon_process import DaemonProcess, World, until, world
from tests.lts_mounts import PLAIN
from tests.servers import S3Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

PID, OTHER, ABSENT = "20.500.1/one", "20.500.1/two", "20.500.1/absent"
TOKEN, READER = "operator-0123456789", "reader-0123456789"
FILES = {"a.txt": b"first", "sub/b.bin": bytes(range(256)) * 1000}


class Site:
    """A daemon with tokens, and ``mover`` on a host that has neither S3 nor an LTS."""

    def __init__(self, place: World, daemon: DaemonProcess, folder: Path) -> None:
        self.place, self.daemon, self.folder = place, daemon, folder
        kept = ("PATH", "HOME", "PYTHONPATH", "LANG")
        self.environ = {name: value for name, value in place.environ.items() if name in kept}
        self.environ["MOVER_TOKEN_FILE"] = str(token_file(folder / "mine", TOKEN))

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "mover.cli", *arguments],
            env=self.environ | environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, code: int = 0, **environ: str) -> tuple[str, str]:
        """Standard output and standard error of a command, at this daemon."""
        with self.start(*arguments, **({"MOVER_URL": self.daemon.url} | environ)) as process:
            out, err = process.communicate(timeout=50)
        assert process.returncode == code, err
        assert TOKEN not in out + err
        assert "Traceback" not in err
        return out, err

    def document(self, *arguments: str, code: int = 0) -> Any:  # noqa: ANN401 - as JSON is
        return msgspec.json.decode(self.run("--json", *arguments, code=code)[0])


def token_file(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def site(moto_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("daemon")
    with world(folder, moto_server) as place:
        place.put(PID, FILES)
        place.put(OTHER, FILES)
        tokens = token_file(folder / "tokens", f"ann:operate:{TOKEN}\neye:read:{READER}\n")
        with place.daemon(MOVER_TOKEN_FILE=str(tokens), MOVER_SOCKET=str(folder / "mover.sock")) as daemon:
            daemon.client.headers["Authorization"] = f"Bearer {TOKEN}"
            daemon.until_ready()
            yield Site(place, daemon, folder)


def test_a_dataset_goes_there_and_back_as_it_would_from_here(site: Site) -> None:
    planned = site.document("plan", PID)["datasets"][0]
    assert (planned["file_count"], planned["datablocks"][0]["members"], planned["forecast"]["fits"]) == (2, 2, True)
    assert planned["forecast"]["floor_percentage"] == 0  # the daemon's, which is nothing that is set here
    assert "in all" in site.run("plan", PID)[0]
    assert "in all" in site.run("archive", "--dry-run", PID)[0]

    archived = site.document("archive", PID, OTHER, PID)
    assert [item["dataset_id"] for item in archived["datasets"]] == [PID, OTHER]
    assert archived["datasets"][0]["datablocks"][0]["evidence"] == "read-back"
    assert (site.place.lts / archive_id(PID, 1)).is_file()
    out, err = site.run("archive", PID)
    assert f"{PID}: archived in" in out
    assert "job " in err

    assert f"{PID}: verified (read-back)" in site.run("verify", PID)[0]
    script = site.folder / "get.sh"
    out, err = site.run("retrieve", PID, "--as", "files", "--file", "a.txt", "--script", str(script))
    assert httpx.get(out.strip(), trust_env=False, timeout=30).content == b"first"
    assert "the links are good until" in err
    assert script.stat().st_mode & 0o777 == 0o600
    assert site.document("retrieve", PID)["dataset"]["objects"][0]["url"].startswith("http")


def test_failures_have_the_exit_codes_and_the_words_that_they_have_here(site: Site) -> None:
    told = site.document("archive", PID, ABSENT, code=ExitCode.USER)
    assert [item["dataset_id"] for item in told["datasets"]] == [PID]
    assert [(item["dataset_id"], item["error"]["kind"]) for item in told["failures"]] == [
        (ABSENT, "DatasetNotFoundError")
    ]
    assert told["error"]["exit_code"] == ExitCode.USER
    assert "nothing found at" in site.run("retrieve", ABSENT, code=ExitCode.USER)[1]
    assert "segment" in site.run("archive", "../x", code=ExitCode.USAGE)[1]
    for arguments in (("verify", PID, "--dry-run"), ("retrieve", PID, "--dry-run"), ("plan", PID, "--members")):
        assert "not offered by the daemon" in site.run(*arguments, code=ExitCode.USAGE)[1]
    assert "not offered by the daemon" in site.run("ls", "--url", site.daemon.url, code=ExitCode.USAGE)[1]


def test_a_wrong_address_or_token_is_told_as_such(site: Site) -> None:
    reading = str(token_file(site.folder / "reading", READER))
    assert "may read" in site.run("archive", PID, code=ExitCode.USAGE, MOVER_TOKEN_FILE=reading)[1]
    wrong = str(token_file(site.folder / "wrong", "nobodys-0123456789"))
    assert "token" in site.run("jobs", code=ExitCode.USAGE, MOVER_TOKEN_FILE=wrong)[1]
    assert "MOVER_URL" in site.run("jobs", "--url", "nonsense", code=ExitCode.USAGE)[1]


def test_jobs_and_limits_are_shown_and_changed(site: Site) -> None:
    job_id = site.document("archive", PID) and site.document("jobs", "--limit", "1")["jobs"][0]["id"]
    assert job_id in site.run("jobs", "--owner", "ann", "--state", "done")[0]
    assert site.document("jobs", "--state", "queued")["jobs"] == []
    assert site.document("jobs", job_id)["job"]["datasets"][0]["report"]["dataset_id"] == PID
    assert "done" in site.run("jobs", job_id)[0]
    assert site.document("jobs", job_id, "--follow")["job"]["state"] == "done"
    assert site.document("jobs", "cancel", job_id)["job"]["state"] == "done"
    assert "no job" in site.run("jobs", "none", code=ExitCode.USER)[1]
    site.run("jobs", "cancel", code=ExitCode.USAGE)
    site.run("jobs", "--state", "odd", code=ExitCode.USAGE)

    socket = f"unix:{site.folder / 'mover.sock'}"
    limits = site.document("limits", "move_to_lts_limit=3", "--url", socket)["limits"]
    assert {item["name"]: item["slots"] for item in limits}["MOVE_TO_LTS_LIMIT"] == 3
    assert "MOVE_TO_LTS_LIMIT" in site.run("limits")[0]
    for wrong in ("MOVE_TO_LTS_LIMIT=0", "SPEED=3", "MOVE_TO_LTS_LIMIT"):
        assert "NAME=N" in site.run("limits", wrong, code=ExitCode.USAGE)[1]


def test_who_interrupts_a_command_stops_following_and_is_told_how_to_look_again(site: Site) -> None:
    lock = "20.500.1/held"
    site.place.put(lock, {"big": b"x" * 30_000_000})
    with (
        LtsFolder.open(site.place.lts, lock, PLAIN).lock("a test"),  # it waits until this lets go
        site.start("--url", site.daemon.url, "archive", lock, lock + "-none") as process,
    ):
        assert process.stderr is not None
        said = process.stderr.readline()
        assert "job " in said
        job_id = said.split("job ")[1].split()[0]
        process.send_signal(2)
        _, err = process.communicate(timeout=30)
    assert process.returncode == ExitCode.INTERRUPTED
    assert f"mover jobs cancel {job_id}" in err
    until(lambda: site.daemon.job(job_id)["state"] == "failed")
    assert [item["state"] for item in site.daemon.job(job_id)["datasets"]] == ["done", "failed"]
