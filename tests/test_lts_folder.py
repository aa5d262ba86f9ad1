"""A dataset's folder: what shows, what is hidden, what is never overwritten."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from mover.errors import DatasetBusyError, HostileNameError, LtsError, ManifestError, MissingMountError, WriteOnceError
from mover.streams.lts import LtsFolder, list_datasets
from mover.streams.lts_mount import probe_mount
from tests.lts_mounts import PLAIN, visible, write_once

PID = "20.500.11935/4b1c"


def _name(number: int) -> str:
    return f"20.500.11935-4b1c_{number}.tar"


def _write(folder: LtsFolder, name: str, data: bytes) -> None:
    writer = folder.open_writer(name, len(data), resume=False)
    writer.write_at(0, [data])
    writer.commit()


def test_a_missing_root_is_never_created(tmp_path: Path) -> None:
    root = tmp_path / "share"
    with pytest.raises(MissingMountError):
        LtsFolder.open(root, PID, PLAIN)
    with pytest.raises(MissingMountError):
        list(list_datasets(root))
    with pytest.raises(MissingMountError):
        LtsFolder(root, PID, PLAIN).manifest_names()
    assert not root.exists()


def test_looking_for_a_dataset_creates_nothing(tmp_path: Path) -> None:
    folder = LtsFolder.open(tmp_path, PID, PLAIN, create=False)
    assert folder.manifest_names() == []
    assert folder.datablock_size(_name(1)) is None
    assert folder.read_manifest(_name(1)) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pid", ["", "../x", "a/../../x", "/etc", "a//b", "a/", "a/.", "a\0b"])
def test_a_pid_cannot_lead_out_of_the_root(tmp_path: Path, pid: str) -> None:
    with pytest.raises(HostileNameError):
        LtsFolder.open(tmp_path, pid, PLAIN)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../x.tar", "other_1.tar", _name(0), _name(1) + "\n", _name(1) + ".manifest.json"])
def test_a_name_is_one_of_this_datasets_datablocks(tmp_path: Path, name: str) -> None:
    folder = LtsFolder.open(tmp_path, PID, PLAIN)
    with pytest.raises(HostileNameError):
        folder.open_writer(name, 1, resume=False)


def test_only_datablocks_with_manifests_are_listed_by_number(tmp_path: Path) -> None:
    folder = LtsFolder.open(tmp_path, PID, PLAIN)
    assert folder.path == tmp_path / "openem-network/datasets" / PID / "datablocks"
    for number in (10, 9, 1):
        _write(folder, _name(number), b"tar")
        folder.write_manifest(_name(number), b'{"n":%d}' % number)
    _write(folder, _name(2), b"no manifest")
    folder.open_writer(_name(3), 5, resume=False).close()
    for stray in (f".{_name(4)}.manifest.json.part", "other_5.tar.manifest.json", f"{_name(6)}.manifest.json~"):
        (folder.path / stray).write_bytes(b"{}")
    assert folder.manifest_names() == [_name(1), _name(9), _name(10)]
    assert folder.read_manifest(_name(9)) == b'{"n":9}'
    assert (folder.datablock_size(_name(2)), folder.datablock_size(_name(3))) == (11, None)


def test_a_manifest_is_written_once(tmp_path: Path) -> None:
    folder = LtsFolder.open(tmp_path, PID, PLAIN)
    folder.write_manifest(_name(1), b'{"n":1}')
    folder.write_manifest(_name(1), b'{"n":1}')
    with pytest.raises(ManifestError, match="another one"):
        folder.write_manifest(_name(1), b'{"n":2}')
    with pytest.raises(ManifestError, match="no whole JSON"):
        folder.write_manifest(_name(2), b'{"n":')
    assert folder.read_manifest(_name(1)) == b'{"n":1}'
    assert visible(folder.path) == [f"{_name(1)}.manifest.json"]


def test_a_committed_datablock_is_never_written_again_and_an_uncommitted_one_is_replaced(tmp_path: Path) -> None:
    folder = LtsFolder.open(tmp_path, PID, PLAIN)
    _write(folder, _name(1), b"first")
    _write(folder, _name(1), b"second")
    folder.write_manifest(_name(1), b"{}")
    with pytest.raises(LtsError, match="never written again"):
        folder.open_writer(_name(1), 5, resume=True)
    assert (folder.path / _name(1)).read_bytes() == b"second"


def test_damage_on_a_mount_with_rename_is_shown_not_hidden(tmp_path: Path) -> None:
    folder = LtsFolder.open(tmp_path, PID, PLAIN)
    (folder.path / f"{_name(1)}.manifest.json").write_bytes(b'{"torn')
    assert folder.manifest_names() == [_name(1)]
    assert folder.read_manifest(_name(1)) == b'{"torn'


def test_discard_removes_what_writers_left_of_that_datablock_alone(tmp_path: Path) -> None:
    folder = LtsFolder.open(tmp_path, PID, PLAIN)
    for number in (1, 11):
        folder.open_writer(_name(number), 4, resume=False).close()
    folder.discard(_name(1))
    folder.discard(_name(1))
    assert [entry.name[: len(_name(11)) + 1] for entry in folder.path.iterdir()] == [f".{_name(11)}"]


def test_a_withdrawn_datablock_is_resumed_under_the_identity_that_withdraw_returned(tmp_path: Path) -> None:
    folder = LtsFolder.open(tmp_path, PID, PLAIN)
    _write(folder, _name(1), b"tar" * 5000)
    assert folder.taken_bytes(_name(1)) == 0
    file_id = folder.withdraw(_name(1))
    assert folder.datablock_id(_name(1)) == (0, 0)
    assert folder.taken_bytes(_name(1)) >= 15_000
    writer = folder.open_writer(_name(1), 15_000, resume=True)
    assert (writer.resumed, writer.file_id) == (True, file_id)
    assert file_id < 1 << 63
    writer.write_at(0, [b"TAR"])
    writer.commit()
    assert (folder.path / _name(1)).read_bytes() == b"TAR" + b"tar" * 4999
    assert folder.datablock_id(_name(1)) == ((folder.path / _name(1)).stat().st_ino, 15_000)
    folder.write_manifest(_name(1), b"{}")
    with pytest.raises(LtsError, match="manifest stays"):
        folder.withdraw(_name(1))


def test_a_repair_replaces_a_committed_datablock_at_its_commit_and_only_where_renames_work(tmp_path: Path) -> None:
    folder = LtsFolder.open(tmp_path, PID, PLAIN)
    _write(folder, _name(1), b"damaged")
    folder.write_manifest(_name(1), b"{}")
    writer = folder.open_writer(_name(1), 6, resume=False, replace_committed=True)
    writer.write_at(0, [b"mended"])
    assert (folder.path / _name(1)).read_bytes() == b"damaged"
    writer.commit()
    assert (folder.path / _name(1)).read_bytes() == b"mended"
    in_place = LtsFolder(tmp_path, PID, msgspec.structs.replace(PLAIN, rename=False))
    with pytest.raises(WriteOnceError):
        in_place.open_writer(_name(1), 6, resume=False, replace_committed=True)


def test_the_lock_is_the_datasets(tmp_path: Path) -> None:
    folder = LtsFolder.open(tmp_path, PID, PLAIN)
    other = LtsFolder.open(tmp_path, PID + "x", PLAIN)
    with folder.lock("me"), other.lock("me"), pytest.raises(DatasetBusyError, match=PID):
        LtsFolder.open(tmp_path, PID, PLAIN).lock("you")


def test_a_dataset_goes_through_a_write_once_mount(tmp_path: Path) -> None:
    pid_folder = LtsFolder.open(tmp_path, PID, PLAIN).path
    with write_once(pid_folder):
        folder = LtsFolder.open(tmp_path, PID, probe_mount(pid_folder))
        with folder.lock("me"):
            _write(folder, _name(1), b"tar")
            assert folder.manifest_names() == []
            folder.write_manifest(_name(1), b"{}")
            assert folder.manifest_names() == [_name(1)]
            with pytest.raises(LtsError, match="never written again"):
                folder.open_writer(_name(1), 5, resume=True)
            with pytest.raises(ManifestError):
                folder.write_manifest(_name(1), b"[]")
        with folder.lock("again"):
            pass
        folder.open_writer(_name(2), 4, resume=False).close()
        folder.discard(_name(2))
        assert folder.datablock_size(_name(2)) == 0


def test_on_a_write_once_mount_a_torn_manifest_does_not_count_and_is_written_anew(tmp_path: Path) -> None:
    profile = msgspec.structs.replace(PLAIN, rename=False, delete=False)
    folder = LtsFolder.open(tmp_path, PID, profile)
    manifest = b'{"members":[{"path":"a"},{"path":"b"}]}'
    for length in range(len(manifest)):
        (folder.path / f"{_name(1)}.manifest.json").write_bytes(manifest[:length])
        assert folder.manifest_names() == []
        assert folder.read_manifest(_name(1)) is None
    folder.write_manifest(_name(1), manifest)
    assert folder.read_manifest(_name(1)) == manifest
    (folder.path / f"{_name(2)}.manifest.json").write_bytes(manifest[:9])
    stubborn = LtsFolder.open(tmp_path, PID, msgspec.structs.replace(profile, truncate=False))
    with pytest.raises(WriteOnceError, match="torn manifest"):
        stubborn.write_manifest(_name(2), manifest)


_WRITES_MANIFESTS = """
import sys
from pathlib import Path
from mover.streams.lts import LtsFolder
from tests.lts_mounts import PLAIN
folder = LtsFolder.open(Path(sys.argv[1]), "p", PLAIN)
print("go", flush=True)
for number in range(1, 100_000):
    folder.write_manifest(f"p_{number}.tar", b'{"x":"' + b"y" * 100_000 + b'"}')
"""


def test_a_killed_writer_of_manifests_leaves_only_whole_ones(tmp_path: Path) -> None:
    for _ in range(3):
        root = tmp_path / str(_)
        root.mkdir()
        child = subprocess.Popen(
            [sys.executable, "-c", _WRITES_MANIFESTS, str(root)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        child.stdout.readline()
        folder = LtsFolder(root, "p", PLAIN)
        while len(folder.manifest_names()) < 5:
            pass
        child.kill()
        assert child.wait() == -signal.SIGKILL
        child.communicate()
        for name in folder.manifest_names():
            assert len(folder.read_manifest(name) or b"") == 100_008


def test_datasets_are_listed_at_any_depth_and_only_with_manifests(tmp_path: Path) -> None:
    pids = ["a", "a/b", "20.500.11935/4b1c", "x/y/z", "a/datablocks"]
    for pid in pids:
        folder = LtsFolder.open(tmp_path, pid, PLAIN)
        folder.write_manifest(f"{pid.replace('/', '-')}_1.tar", b"{}")
    unfinished = LtsFolder.open(tmp_path, "unfinished", PLAIN)
    _write(unfinished, "unfinished_1.tar", b"tar")
    (unfinished.path / "stranger_1.tar.manifest.json").write_bytes(b"{}")
    assert sorted(list_datasets(tmp_path)) == sorted(pids)


def test_an_empty_share_lists_no_datasets(tmp_path: Path) -> None:
    assert list(list_datasets(tmp_path)) == []
