"""The daemon's jobs in processes that are killed at random moments: nothing is lost, nothing done is done again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import anyio
import msgspec
import pytest

from mover.api import JobOrder
from mover.daemon_jobs import JobServiceConfig
from mover.engine import EngineConfig
from mover.parts import Buckets
from tests.daemon_child import Life, Note
from tests.datasets import make_config, open_engine, random_bytes, upload
from tests.engines import expect_same_files
from tests.servers import S3Server, fresh_bucket

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

KILLS = 20
JOBS = 30
LONGEST_LIFE_S = 1.5
FILES = {f"f{number}": random_bytes(40_000 + number, number) for number in range(6)}
DATASETS = [f"20.500.11935/crash-{number:02d}" for number in range(JOBS)]


class Children:
    """The processes, one after another."""

    def __init__(self, life: Life) -> None:
        self.life = life
        self._forker = subprocess.Popen(
            [sys.executable, "-m", "tests.daemon_child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def start(self) -> int:
        return self._ask(msgspec.json.encode(self.life, enc_hook=str))

    def wait(self) -> int:
        """The exit code; negative: the signal."""
        return self._ask(b"")

    def close(self) -> None:
        self._forker.communicate(timeout=60)

    def _ask(self, line: bytes) -> int:
        assert self._forker.stdin is not None
        assert self._forker.stdout is not None
        self._forker.stdin.write(line + b"\n")
        self._forker.stdin.flush()
        return int(self._forker.stdout.readline())

    def notes(self) -> list[Note]:
        if not self.life.notes.exists():
            return []
        return [msgspec.json.decode(line, type=Note) for line in self.life.notes.read_bytes().splitlines()]


@pytest.fixture
def config(tmp_path: Path, moto_server: S3Server) -> Iterator[EngineConfig]:
    with fresh_bucket(moto_server) as one, fresh_bucket(moto_server) as two, fresh_bucket(moto_server) as three:
        for dataset_id in DATASETS:
            upload(moto_server, one, FILES, dataset_id)
        made = make_config(tmp_path, moto_server, Buckets(one, two, three), target_bytes=130_000)
        yield msgspec.structs.replace(made, wait_before_verify_s=0.3)


@pytest.fixture
def children(tmp_path: Path, config: EngineConfig) -> Iterator[Children]:
    orders = {
        f"{'abc'[index % 3]}-{index}": JobOrder("archive", (dataset_id,)) for index, dataset_id in enumerate(DATASETS)
    }
    jobs = JobServiceConfig(config.scratch_folder / "daemon", datasets_at_a_time=2)
    made = Children(Life(config, jobs, orders, tmp_path / "notes", tmp_path / "stderr"))
    yield made
    made.close()


def journal_of(folder: Path, aside: Path) -> dict[str, str]:
    """State of each dataset, from a copy: the next process finds the journal as it was left."""
    aside.mkdir(exist_ok=True)
    for name in ("jobs.sqlite", "jobs.sqlite-wal"):
        (aside / name).unlink(missing_ok=True)
        if (folder / name).exists():
            shutil.copy(folder / name, aside / name)
    (aside / "jobs.sqlite-shm").unlink(missing_ok=True)
    with closing(sqlite3.connect(aside / "jobs.sqlite")) as connection:
        try:
            return dict(connection.execute("SELECT dataset_id, state FROM items"))
        except sqlite3.OperationalError:
            return {}  # killed before there were tables


def wait_for(children: Children, pid: int, what: str, dice: random.Random) -> None:
    """Until the process has noted something, for a while."""
    deadline = time.monotonic() + 30
    while not any(note.pid == pid and note.what == what for note in children.notes()):
        assert time.monotonic() < deadline, children.life.stderr.read_text()
        time.sleep(0.005 * dice.random())


def test_20_kills_with_30_jobs_queued_lose_nothing_and_repeat_nothing(
    children: Children, config: EngineConfig, tmp_path: Path
) -> None:
    seed = int(os.environ.get("CRASH_SEED", "0")) or random.SystemRandom().randrange(1 << 30)
    sys.stderr.write(f"seed {seed}\n")
    dice = random.Random(seed)
    done: set[str] = set()
    done_before: dict[int, set[str]] = {}  # by process: what was done when it started
    unfinished_at_kill = []
    for kill in range(KILLS):
        done_before[pid := children.start()] = set(done)
        if kill >= 2:  # the first ones may die before they are up, or while they accept
            wait_for(children, pid, "up", dice)
        time.sleep(LONGEST_LIFE_S * dice.random() * (JOBS - len(done)) / JOBS)
        os.kill(pid, signal.SIGKILL)
        assert children.wait() == -signal.SIGKILL, "nothing was left to be killed"
        found = journal_of(children.life.jobs.folder, tmp_path / "copy")
        now_done = {dataset_id for dataset_id, state in found.items() if state == "done"}
        assert done <= now_done, "what was done is done no more"
        done = now_done
        unfinished_at_kill.append(JOBS - len(done))
    done_before[children.start()] = set(done)
    assert children.wait() == 0, children.life.stderr.read_text()
    sys.stderr.write(f"unfinished at each kill: {unfinished_at_kill}\n")
    assert unfinished_at_kill[-1] >= 1
    assert len(set(unfinished_at_kill)) >= 5, "hardly anything happened between the kills"

    check_notes(children.notes(), done_before)
    check_journal(children.life.jobs.folder)
    anyio.run(check_datasets, config)


async def check_datasets(config: EngineConfig) -> None:
    for dataset_id in DATASETS:
        expect_same_files(config.lts_root, FILES, dataset_id)
    async with open_engine(config) as engine:
        for dataset_id in DATASETS:
            assert len((await engine.verify(dataset_id)).datablocks) == 2


def check_notes(notes: list[Note], done_before: dict[int, set[str]]) -> None:
    accepted: dict[str, set[str]] = {}
    for note in notes:
        if note.what == "accepted":
            accepted.setdefault(note.name, set()).add(note.job_id)
    assert {key: len(ids) for key, ids in accepted.items()} == dict.fromkeys(accepted, 1), "a job was lost"
    again = [(note.pid, note.name) for note in notes if note.what == "begins" if note.name in done_before[note.pid]]
    assert again == [], "what was done was run again"
    begins = Counter((note.pid, note.name) for note in notes if note.what == "begins")
    assert set(begins.values()) == {1}
    resumed = {name for _, name in begins if sum(other == name for _, other in begins) > 1}
    assert resumed, "no kill hit a dataset in work"


def check_journal(folder: Path) -> None:
    """Every job ended as done, exactly once."""
    with closing(sqlite3.connect(folder / "jobs.sqlite")) as connection:
        assert connection.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall() == [("done", JOBS)]
        assert connection.execute("SELECT state, count(*) FROM items GROUP BY state").fetchall() == [("done", JOBS)]
        ends = connection.execute(
            "SELECT dataset_id, count(*) FROM transitions WHERE state = 'done' AND dataset_id <> '' GROUP BY dataset_id"
        ).fetchall()
    assert sorted(ends) == [(dataset_id, 1) for dataset_id in DATASETS]
