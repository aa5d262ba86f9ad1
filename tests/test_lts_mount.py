"""The probe tells what a mount can do by doing it; free space is what a writer may take."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from mover.engine import Engine, EngineConfig
from mover.errors import LtsError, MissingMountError
from mover.parts import Buckets
from mover.streams import lts_mount
from mover.streams.lts_mount import allocate, filesystem_of, free_space, probe_mount
from mover.streams.lts_writer import LtsWriter
from mover.streams.s3_calls import S3Endpoint
from tests.lts_mounts import PLAIN, hung_mount, old_filesystem, small_mount, write_once


def _refusing(number: int) -> Callable[..., None]:
    def call(*_args: object, **_options: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def test_a_local_disk_can_do_everything_and_keeps_no_probe(tmp_path: Path) -> None:
    profile = probe_mount(tmp_path)
    assert msgspec.structs.replace(profile, filesystem="", fallocate=True) == msgspec.structs.replace(
        PLAIN, filesystem=""
    )
    assert not profile.write_once
    assert profile.filesystem == filesystem_of(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_write_once_folder_is_recognised_again_and_again(tmp_path: Path) -> None:
    with write_once(tmp_path / "worm") as folder:
        first = probe_mount(folder)
        left = sorted(entry.name for entry in folder.iterdir())
        assert (first.rename, first.delete, first.truncate, first.write_once) == (False, False, True, True)
        assert probe_mount(folder) == first
        assert sorted(entry.name for entry in folder.iterdir()) == left == [".mover-probe"]


def test_a_probe_file_that_is_closed_for_writing_means_no_truncate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".mover-probe").touch()
    real_open = os.open

    def closed(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", closed)
    profile = probe_mount(tmp_path)
    assert (profile.truncate, profile.fallocate, profile.locks, profile.rename) == (False, False, False, True)


def test_a_mount_without_lock_service_has_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", _refusing(errno.ENOLCK))
    assert not probe_mount(tmp_path).locks


def test_a_lock_that_lets_a_second_holder_in_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_args: None)
    assert not probe_mount(tmp_path).locks


def test_locks_that_stay_on_this_host_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lts_mount, "_mount_of", lambda _path: ("nfs4", frozenset({"rw", "local_lock=all"})))
    assert not probe_mount(tmp_path).locks


def test_a_probe_beside_another_one_still_finds_the_locks(tmp_path: Path) -> None:
    with (tmp_path / ".mover-probe").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert probe_mount(tmp_path).locks


def test_failures_of_the_moment_are_no_property_of_the_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lts_mount, "rename_file", _refusing(errno.EIO))
    with pytest.raises(LtsError, match="EIO"):
        probe_mount(tmp_path)


def test_many_processes_may_probe_one_folder_at_once(tmp_path: Path) -> None:
    code = (
        "import sys,pathlib;from mover.streams.lts_mount import probe_mount as p;"
        "print({(q.rename,q.delete,q.truncate,q.locks) for q in (p(pathlib.Path(sys.argv[1])) for _ in range(300))})"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert {child.communicate()[0].strip() for child in children} == {"{(True, True, True, True)}"}


def test_a_missing_mount_is_an_error_not_an_empty_share(tmp_path: Path) -> None:
    with pytest.raises(MissingMountError):
        probe_mount(tmp_path / "missing")
    with pytest.raises(MissingMountError):
        free_space(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(MissingMountError):
        free_space(tmp_path / "file")


def test_free_space_is_that_of_the_mount_and_falls_with_what_is_taken(tmp_path: Path) -> None:
    with small_mount(tmp_path / "share") as share:
        before = free_space(share)
        assert before.total_bytes == 8 << 20
        (share / "file").write_bytes(bytes(1 << 20))
        assert before.free_bytes - free_space(share).free_bytes == 1 << 20
        assert filesystem_of(share) == "tmpfs"
        assert not probe_mount(share).o_direct


def test_allocation_takes_the_space_without_writing(tmp_path: Path) -> None:
    if not probe_mount(tmp_path).fallocate:
        pytest.skip("the file system below has no fallocate")
    with (tmp_path / "file").open("wb") as file:
        assert allocate(file.fileno(), 1 << 20)
        assert os.fstat(file.fileno()).st_blocks * 512 >= 1 << 20


def test_allocation_beyond_4_gib_is_not_cut_to_32_bits(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        if not allocate(file.fileno(), (4 << 30) + 4096):
            pytest.skip("the file system below has no fallocate")
        assert os.fstat(file.fileno()).st_size == (4 << 30) + 4096


def test_where_nothing_can_be_allocated_nothing_is_written_instead(tmp_path: Path) -> None:
    with old_filesystem(tmp_path / "old") as share:
        assert not probe_mount(share).fallocate
        with (share / "file").open("wb") as file:
            os.ftruncate(file.fileno(), 4 << 20)
            assert not allocate(file.fileno(), 4 << 20)
            assert os.fstat(file.fileno()).st_blocks == 0, "no zeros in place of the space"
        writer = LtsWriter.open(share / "d_1.tar", 4, probe_mount(share), resume=False)
        assert not writer.allocated
        writer.write_at(0, [b"data"])
        writer.commit()
        assert (share / "d_1.tar").read_bytes() == b"data"


def _config(lts_root: Path, **changes: object) -> EngineConfig:
    config = EngineConfig(
        s3=S3Endpoint(endpoint_url="http://127.0.0.1:9", region="r", access_key="a", secret_key="s"),
        buckets=Buckets(landing_zone="l", staging="s", retrieval="r"),
        lts_root=lts_root,
        scratch_folder=lts_root,
    )
    return msgspec.structs.replace(config, **changes)


@pytest.mark.anyio
async def test_a_mount_that_hangs_is_told_by_name_once_the_time_is_over(tmp_path: Path) -> None:
    with hung_mount(tmp_path), pytest.raises(LtsError, match=r"no answer for 0\.2 s") as caught:
        async with Engine.open(_config(tmp_path, lts_file_timeout_s=0.2)):
            pytest.fail("it opened")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.anyio
async def test_an_engine_writes_nothing_where_the_lts_is_not_of_its_type(tmp_path: Path) -> None:
    config = _config(tmp_path, lts_filesystem="nfs")
    with pytest.raises(MissingMountError, match="nfs"):
        async with Engine.open(config):
            pass
    assert list(tmp_path.iterdir()) == []
    async with Engine.open(msgspec.structs.replace(config, lts_filesystem=filesystem_of(tmp_path))):
        pass
