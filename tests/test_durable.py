"""Durable writes: what a kill leaves, in which order the kernel sees the steps, what is never overwritten."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mover.errors import LayoutMismatchError
from mover.streams import durable
from mover.streams.durable import (
    append_durably,
    commit_file,
    make_folder_durably,
    rename_file,
    write_file_durably,
)
from tests.programs import needed_program

_KILLED_AT_LINE = """
import os, signal, sys
from pathlib import Path
from mover.streams import durable
left = int(sys.argv[2])
def trace(frame, event, arg):
    global left
    if frame.f_code.co_filename != durable.__file__:
        return None
    if event == "line":
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return trace
sys.settrace(trace)
durable.write_file_durably(Path(sys.argv[1]), b"new" * 10_000)
"""


@pytest.mark.slow
def test_a_kill_at_any_line_leaves_the_old_content_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    contents = []
    for line in range(1, 200):
        path.write_bytes(b"old")
        child = subprocess.run([sys.executable, "-c", _KILLED_AT_LINE, str(path), str(line)], check=False)
        contents.append(path.read_bytes())
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL
    else:
        pytest.fail("the write never came to its end")
    new = b"new" * 10_000
    assert set(contents) == {b"old", new}
    assert contents == sorted(contents, reverse=True), "once new, new for ever"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"], "the last run used up what the others left"


def test_the_kernel_sees_write_sync_rename_sync_folder_in_this_order(tmp_path: Path) -> None:
    strace = needed_program("strace")
    code = (
        "import sys,pathlib;from mover.streams.durable import write_file_durably as w;w(pathlib.Path(sys.argv[1]),b'x')"
    )
    log = tmp_path / "calls"
    target = tmp_path / "folder" / "name"
    target.parent.mkdir()
    calls = "trace=openat,write,fsync,fdatasync,rename,renameat,renameat2"
    subprocess.run([strace, "-y", "-o", log, "-e", calls, sys.executable, "-c", code, target], check=True)
    seen = [line.split("(")[0] for line in log.read_text().splitlines() if str(target.parent) in line]
    assert seen == ["openat", "write", "fsync", "rename", "openat", "fsync"]


def test_a_failed_sync_changes_nothing_and_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(b"old")

    def failing(fd: int) -> None:
        raise OSError(5, os.strerror(5), fd)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output"):
        write_file_durably(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.json"]


def test_short_writes_go_on_where_they_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[:7]))
    data = bytes(range(256))
    write_file_durably(tmp_path / "file", data)
    fd = os.open(tmp_path / "journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    append_durably(fd, data)
    append_durably(fd, b"next")
    os.close(fd)
    assert (tmp_path / "file").read_bytes() == data
    assert (tmp_path / "journal").read_bytes() == data + b"next"


def test_without_replace_what_stands_there_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    write_file_durably(path, b"first", replace=False)
    with pytest.raises(FileExistsError):
        write_file_durably(path, b"second", replace=False)
    assert path.read_bytes() == b"first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.json"]


def test_where_the_kernel_has_no_exclusive_rename_the_check_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "_rename_exclusively", lambda *_names: False)
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"a")
    rename_file(source, target, replace=False)
    source.write_bytes(b"later")
    with pytest.raises(FileExistsError):
        rename_file(source, target, replace=False)
    assert target.read_bytes() == b"a"
    rename_file(source, target, replace=True)
    assert target.read_bytes() == b"later"


def test_a_file_of_another_size_is_not_committed(tmp_path: Path) -> None:
    temporary, final = tmp_path / ".part", tmp_path / "final"
    temporary.write_bytes(b"12345")
    fd = os.open(temporary, os.O_RDWR)
    with pytest.raises(LayoutMismatchError, match="planned 6"):
        commit_file(fd, temporary, final, 6)
    assert not final.exists()
    commit_file(fd, temporary, final, 5)
    os.close(fd)
    assert final.read_bytes() == b"12345"


def test_folders_are_made_below_an_existing_root_only(tmp_path: Path) -> None:
    make_folder_durably(tmp_path / "a" / "b", below=tmp_path)
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(FileNotFoundError):
        make_folder_durably(tmp_path / "missing" / "b", below=tmp_path / "missing")
    with pytest.raises(FileNotFoundError):
        make_folder_durably(tmp_path.parent / "elsewhere", below=tmp_path)
    assert not (tmp_path / "missing").exists()
