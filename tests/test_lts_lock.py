"""Two runs never hold one dataset; a killed holder holds nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from mover.errors import DatasetBusyError, LtsError
from mover.streams.durable import rename_file
from mover.streams.lts_lock import LEASE_EXPIRY_S, DatasetLock, lock_dataset
from mover.streams.lts_mount import MountProfile
from tests.lts_mounts import PLAIN

NO_LOCKS = msgspec.structs.replace(PLAIN, locks=False)
BOTH = pytest.mark.parametrize("profile", [PLAIN, NO_LOCKS], ids=["lock", "lease"])

_HOLDER = """
import sys
from pathlib import Path
import msgspec
from mover.streams.lts_lock import lock_dataset
from tests.lts_mounts import PLAIN
profile = msgspec.structs.replace(PLAIN, locks=sys.argv[2] == "True")
lock = lock_dataset(Path(sys.argv[1]), "pid/1", "host-b process 77 since noon", profile)
print("held", flush=True)
sys.stdin.read()
"""


def _start_holder(folder: Path, profile: MountProfile) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(folder), str(profile.locks)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


def _lock(folder: Path, profile: MountProfile = PLAIN) -> DatasetLock:
    return lock_dataset(folder, "pid/1", "host-a process 1", profile)


@BOTH
def test_a_second_run_in_this_process_is_refused_until_the_first_ends(tmp_path: Path, profile: MountProfile) -> None:
    with _lock(tmp_path, profile) as lock:
        lock.refresh()
        with pytest.raises(DatasetBusyError, match="'pid/1' is in use by host-a process 1"):
            _lock(tmp_path, profile)
        lock.refresh()
    lock.release()
    with pytest.raises(LtsError, match="lost"):
        lock.refresh()
    _lock(tmp_path, profile).release()


@BOTH
def test_a_run_in_another_process_is_named(tmp_path: Path, profile: MountProfile) -> None:
    child = _start_holder(tmp_path, profile)
    with pytest.raises(DatasetBusyError, match="host-b process 77 since noon"):
        _lock(tmp_path, profile)
    child.kill()
    child.communicate()


def test_a_killed_holder_frees_the_dataset_at_once(tmp_path: Path) -> None:
    child = _start_holder(tmp_path, PLAIN)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    child.communicate()
    with _lock(tmp_path) as lock:
        assert lock.holder == "host-a process 1"


def test_a_killed_leaseholder_frees_the_dataset_when_the_lease_expires(tmp_path: Path) -> None:
    child = _start_holder(tmp_path, NO_LOCKS)
    child.kill()
    child.communicate()
    lease = tmp_path / ".lease"
    now = time.time()
    os.utime(lease, (now, now - LEASE_EXPIRY_S + 30))
    with pytest.raises(DatasetBusyError):
        _lock(tmp_path, NO_LOCKS)
    os.utime(lease, (now, now - LEASE_EXPIRY_S - 30))
    with _lock(tmp_path, NO_LOCKS):
        assert "host-a" in lease.read_text()
    assert list(tmp_path.iterdir()) == []


def test_refresh_prolongs_a_lease(tmp_path: Path) -> None:
    with _lock(tmp_path, NO_LOCKS) as lock:
        lease = tmp_path / ".lease"
        os.utime(lease, (0, 0))
        lock.refresh()
        assert time.time() - lease.stat().st_mtime < 60
        with pytest.raises(DatasetBusyError):
            _lock(tmp_path, NO_LOCKS)


def test_a_run_that_slept_through_its_lease_learns_that_it_lost_it_and_leaves_the_new_one_alone(tmp_path: Path) -> None:
    sleeper = _lock(tmp_path, NO_LOCKS)
    os.utime(tmp_path / ".lease", (0, 0))
    with _lock(tmp_path, NO_LOCKS) as second:
        with pytest.raises(LtsError, match="lost"):
            sleeper.refresh()
        sleeper.release()
        second.refresh()


def test_of_many_that_find_an_expired_lease_one_gets_it(tmp_path: Path) -> None:
    for _ in range(20):
        _lock(tmp_path, NO_LOCKS)
        os.utime(tmp_path / ".lease", (0, 0))
        held = _take_at_once(tmp_path, 6)
        assert len([lock for lock in held if _holds(lock)]) == 1
        for lock in held:
            lock.release()
        (tmp_path / ".lease").unlink(missing_ok=True)


def test_a_run_that_takes_away_the_lease_of_a_quicker_one_gives_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _lock(tmp_path, NO_LOCKS)
    os.utime(tmp_path / ".lease", (0, 0))
    quicker: list[DatasetLock] = []

    def overtaken(source: Path, target: Path, *, replace: bool) -> None:
        monkeypatch.setattr("mover.streams.lts_lock.rename_file", rename_file)
        quicker.append(_lock(tmp_path, NO_LOCKS))
        rename_file(source, target, replace=replace)

    monkeypatch.setattr("mover.streams.lts_lock.rename_file", overtaken)
    with pytest.raises(DatasetBusyError):
        _lock(tmp_path, NO_LOCKS)
    quicker[0].refresh()
    quicker[0].release()
    assert list(tmp_path.iterdir()) == []


def _take_at_once(folder: Path, runs: int) -> list[DatasetLock]:
    held: list[DatasetLock] = []
    start = threading.Barrier(runs)

    def attempt() -> None:
        start.wait()
        with suppress(DatasetBusyError):
            held.append(_lock(folder, NO_LOCKS))

    threads = [threading.Thread(target=attempt) for _ in range(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return held


def _holds(lock: DatasetLock) -> bool:
    try:
        lock.refresh()
    except LtsError:
        return False
    return True


def test_a_lock_file_that_was_deleted_under_its_holder_is_a_lost_lock(tmp_path: Path) -> None:
    with _lock(tmp_path) as lock:
        (tmp_path / ".lock").unlink()
        with pytest.raises(LtsError, match="lost"):
            lock.refresh()


def test_a_write_once_mount_without_locks_is_refused(tmp_path: Path) -> None:
    profile = msgspec.structs.replace(PLAIN, locks=False, rename=False, delete=False)
    with pytest.raises(LtsError, match="without file locks"):
        _lock(tmp_path, profile)


def test_a_lock_service_that_fails_is_an_error_not_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", failing)
    with pytest.raises(LtsError, match="ENOLCK"):
        _lock(tmp_path)
