"""The SciCat backend as a program of its own: it forgets nothing, whatever ends it, and needs nothing of the tests."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import anyio
import httpx
import pytest

from mover.catalogue import JobDataset
from mover.jobs_lifecycle import SUBMITTED
from mover.scicat import SciCat, SciCatAccess
from mover.settings_rules import Secret
from mover.trial import TrialDataset
from tests.scicat_fake.seeding import dataset_body, origdatablock_bodies
from tests.scicat_fake.server import INGESTOR

_PACKAGE = Path(__file__).parent / "scicat_fake"
PID = "20.500.11935/a b"
DATASET = f"/api/v3/datasets/{quote(PID, safe='')}"


class Program:
    """The server in a process of its own, as a deployment starts it: from a copy that has no other tests beside it."""

    def __init__(self, folder: Path) -> None:
        self._root = folder / "root"
        shutil.copytree(_PACKAGE, self._root / "tests" / "scicat_fake", ignore=shutil.ignore_patterns("__pycache__"))
        (self._root / "tests" / "__init__.py").touch()
        self.state = folder / "state.db"
        user, password = folder / "user", folder / "password"
        user.write_text("me\n")
        password.write_text("from-a-file\n")
        self.options = ["--user-file", str(user), "--password-file", str(password), "--state", str(self.state)]

    def start(self, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.scicat_fake", "--host", "127.0.0.1", "--port", "0"]
        command += [*self.options, *options]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self._root, env={}, stdout=pipe, stderr=pipe, text=True)

    @contextmanager
    def running(self, *options: str, kill: bool = False) -> Iterator[httpx.Client]:
        """A client with the archive's account; the server is killed at the end, or stopped and looked at."""
        with self.start(*options) as process:
            try:
                assert process.stdout
                with httpx.Client(base_url=process.stdout.readline().strip(), trust_env=False, timeout=20) as client:
                    _wait_until_healthy(client)
                    client.headers["Authorization"] = login(client, "me", "from-a-file")
                    yield client
                if not kill:
                    process.terminate()
                    assert process.communicate(timeout=10) == ("", "")
                    assert process.returncode == 0
            finally:
                process.kill()


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)


def _wait_until_healthy(client: httpx.Client) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            client.get("/api/v3/health").raise_for_status()
        except httpx.HTTPError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        else:
            return


def login(client: httpx.Client, user: str, password: str) -> str:
    answer = client.post("/api/v3/auth/login", json={"username": user, "password": password}).raise_for_status()
    return f"Bearer {answer.json()['access_token']}"


def post(client: httpx.Client, path: str, body: object) -> dict[str, object]:
    answer: dict[str, object] = client.post(path, json=body).raise_for_status().json()
    return answer


def announce(client: httpx.Client, pid: str = PID, files: Sequence[str] = ("a", "b/c")) -> None:
    post(client, "/api/v3/datasets", dataset_body(pid))
    for body in origdatablock_bodies(pid, dict.fromkeys(files, 3), directories=False):
        post(client, "/api/v3/origdatablocks", body)


def order(client: httpx.Client, *pids: str) -> str:
    wanted = [{"pid": pid, "files": []} for pid in pids]
    return str(post(client, "/api/v4/jobs", {"type": "archive", "jobParams": {"datasetList": wanted}})["id"])


def datablock(archive_id: str) -> dict[str, object]:
    file = {"path": "a", "size": 3, "time": "2025-06-15T17:06:40+02:00"}
    return {"archiveId": archive_id, "size": 3, "packedSize": 9, "version": "1", "dataFileList": [file]}


def everything(client: httpx.Client) -> dict[str, object]:
    paths = ("datasets", "origdatablocks", "datablocks", "jobs")
    seen = {path: client.get(f"/api/v3/{path}").raise_for_status().json() for path in paths}
    return {**seen, "history": client.get("/fake/history").raise_for_status().json()}


@pytest.mark.parametrize("kill", [False, True])
def test_all_that_was_answered_is_there_after_a_restart(program: Program, kill: bool) -> None:
    with program.running(kill=kill) as client:
        announce(client)
        announce(client, "another")
        job = order(client, PID)
        gone = post(client, f"{DATASET}/datablocks", datablock("x_1.tar"))
        post(client, f"{DATASET}/datablocks", datablock("x_2.tar"))
        client.delete(f"{DATASET}/datablocks/{gone['id']}").raise_for_status()
        client.patch(f"{DATASET}/datasetlifecycle", json={"archiveStatusMessage": "started"}).raise_for_status()
        client.patch(f"/api/v4/jobs/{job}", json={"statusCode": "inProgress", "statusMessage": "x"}).raise_for_status()
        before, token = everything(client), client.headers["Authorization"]
    with program.running() as client:
        assert everything(client) == before
        client.headers["Authorization"] = token
        assert client.get(f"/api/v4/jobs/{job}").json()["statusCode"] == "inProgress"
        taken = client.post("/api/v3/datablocks", json={**datablock("x_2.tar"), "datasetId": "another"})
        assert taken.status_code == 409
        post(client, f"{DATASET}/datablocks", datablock("x_1.tar"))
    assert program.state.stat().st_mode & 0o077 == 0
    assert b"from-a-file" not in program.state.read_bytes()


@pytest.mark.slow
def test_deletions_and_a_reset_are_kept_too(program: Program) -> None:
    with program.running(kill=True) as client:
        announce(client)
        announce(client, "deleted")
        client.delete("/api/v3/datasets/deleted").raise_for_status()
    with program.running(kill=True) as client:
        assert [dataset["pid"] for dataset in client.get("/api/v3/datasets").json()] == [PID]
        client.post("/fake/reset").raise_for_status()
        client.headers["Authorization"] = login(client, "me", "from-a-file")
        announce(client, "first of the new ones")
        after = everything(client)
    with program.running() as client:
        assert everything(client) == after


@pytest.mark.slow
def test_changes_that_come_together_are_all_kept(program: Program) -> None:
    with program.running(kill=True) as client:
        announce(client)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: post(client, f"{DATASET}/datablocks", datablock(name)), map(str, range(50))))
    with program.running() as client:
        assert client.get(f"{DATASET}/datablocks/count").json() == {"count": 50}


@pytest.mark.slow
def test_a_seed_is_sown_once(program: Program, tmp_path: Path) -> None:
    seed = tmp_path / "seed.json"
    job = {"kind": "archive", "datasets": ["p"]}
    seed.write_text(json.dumps({"datasets": [{"pid": "p", "files": {"a": 1}}], "jobs": [job]}))
    with program.running("--seed", str(seed), "--switch", "token_lifetime_s=60", kill=True) as client:
        before = everything(client)
        assert client.get("/fake/switches").json()["token_lifetime_s"] == 60
    with program.running("--seed", str(seed)) as client:
        assert everything(client) == before


@pytest.mark.slow
def test_a_large_dataset_costs_its_neighbours_nothing(program: Program) -> None:
    with program.running() as client:
        announce(client)

        def changes_s() -> float:
            began_s = time.monotonic()
            for number in range(20):
                change = {"archiveStatusMessage": f"step {number}"}
                client.patch(f"{DATASET}/datasetlifecycle", json=change).raise_for_status()
            return time.monotonic() - began_s

        alone_s = min(changes_s() for _ in range(3))
        announce(client, "large", [f"run/{number // 1000}/image-{number:06}.tif" for number in range(25_000)])
        assert min(changes_s() for _ in range(3)) < 5 * alone_s + 0.2


@pytest.mark.slow
def test_a_file_has_one_server_and_a_secret_something_in_it(program: Program, tmp_path: Path) -> None:
    with program.running():
        out, said = program.start().communicate(timeout=20)
        assert (out, "locked" in said) == ("", True)
    (tmp_path / "password").write_text("\n")
    out, said = program.start().communicate(timeout=20)
    assert (out, "password" in said, "Traceback" in said) == ("", True, False)


def test_the_overview_shows_states_without_links_and_markup(program: Program) -> None:
    with program.running() as client:
        announce(client, "<b>x")
        job = order(client, "<b>x")
        done = {"statusCode": "finishedSuccessful", "statusMessage": "fine", "jobResultObject": {"url": "presigned"}}
        client.patch(f"/api/v4/jobs/{job}", json=done).raise_for_status()
        answer = httpx.get(f"{client.base_url}/", trust_env=False)
    assert answer.headers["content-type"].startswith("text/html")
    for shown in (job, "finishedSuccessful", "datasetCreated", "&lt;b&gt;x"):
        assert shown in answer.text
    for hidden in ("presigned", "<b>"):
        assert hidden not in answer.text


def _with_mover(client: httpx.Client, work: Callable[[SciCat], Awaitable[str]]) -> str:
    async def run() -> str:
        access = SciCatAccess(endpoint_url=str(client.base_url), user="me", password=Secret("from-a-file"))
        async with SciCat.open(access) as catalogue:
            return await work(catalogue)

    return anyio.run(run)


@pytest.mark.slow
def test_the_movers_trial_needs_nothing_but_its_account(program: Program) -> None:
    dataset = TrialDataset(PID, 25_000, 1)

    async def announce_and_order(catalogue: SciCat) -> str:
        await catalogue.trial.announce(PID, dataset.files())
        return await catalogue.trial.order("archive", [JobDataset(PID)])

    async def look(catalogue: SciCat) -> str:
        assert (await catalogue.lifecycle(PID)).archivable
        listed = {(file.path, file.size_bytes) async for file in await catalogue.listed_files(PID)}
        assert listed == {(file.path, file.size_bytes) for file in dataset.files()}
        return (await catalogue.job(job_id)).status_code

    with program.running(kill=True) as client:
        job_id = _with_mover(client, announce_and_order)
    with program.running() as client:
        assert _with_mover(client, look) == SUBMITTED


@pytest.mark.slow
def test_the_ingestors_account_is_there(program: Program) -> None:
    with program.running() as client:
        client.headers["Authorization"] = login(client, INGESTOR, INGESTOR)
        announce(client)
