"""Writing a datablock: each byte at its place, committed whole or not at all, full shares named, resume after kills."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from mover.errors import ExitCode, LayoutMismatchError, LtsError, NotEnoughSpaceError, WriteOnceError
from mover.streams.durable import sync_data
from mover.streams.lts_mount import probe_mount
from mover.streams.lts_writer import LtsWriter
from tests.lts_mounts import PLAIN, closed_for_change, small_mount, visible, write_once


def test_bytes_from_many_threads_land_at_their_offsets_and_are_written_once(tmp_path: Path) -> None:
    final = tmp_path / "d_1.tar"
    data = random.Random(1).randbytes(1_000_003)
    writer = LtsWriter.open(final, len(data), PLAIN, resume=False)

    def write(starts: Sequence[int]) -> None:
        for start in starts:
            part = memoryview(data)[start : start + 5000]
            writer.write_at(start, [part[:7], bytearray(part[7:4000]), bytes(part[4000:])])

    starts = list(range(0, len(data), 5000))
    random.Random(2).shuffle(starts)
    threads = [threading.Thread(target=write, args=(starts[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert visible(tmp_path) == [], "nothing shows before the commit"
    writer.checkpoint()
    writer.commit()
    writer.close()
    assert hashlib.sha256(final.read_bytes()).digest() == hashlib.sha256(data).digest()
    assert writer.written_bytes == len(data)
    assert list(tmp_path.iterdir()) == [final]


def test_short_writes_and_thousands_of_buffers_are_written_to_the_last_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_pwritev = os.pwritev

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        assert len(buffers) <= 1024
        cut = [buffers[0], buffers[1][:3]] if len(buffers) > 1 else [buffers[0][:3]]
        return real_pwritev(fd, cut, offset)

    data = random.Random(3).randbytes(12_000)
    writer = LtsWriter.open(tmp_path / "d_1.tar", len(data), PLAIN, resume=False)
    monkeypatch.setattr(os, "pwritev", short)
    writer.write_at(0, [data[start : start + 5] for start in range(0, len(data), 5)] + [b""])
    writer.commit()
    assert (tmp_path / "d_1.tar").read_bytes() == data


def test_the_length_is_set_and_the_space_taken_before_the_first_byte(tmp_path: Path) -> None:
    writer = LtsWriter.open(tmp_path / "d_1.tar", 1 << 20, probe_mount(tmp_path), resume=False)
    stat = writer.temporary.stat()
    assert stat.st_size == 1 << 20
    assert writer.allocated == (stat.st_blocks * 512 >= 1 << 20)
    assert stat.st_mode & 0o777 == 0o644 & ~_umask()
    writer.close()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_bytes_outside_the_plan_are_refused(tmp_path: Path) -> None:
    writer = LtsWriter.open(tmp_path / "d_1.tar", 10, PLAIN, resume=False)
    for offset in (-1, 9):
        with pytest.raises(LayoutMismatchError):
            writer.write_at(offset, [b"ab"])
    writer.close()


def test_a_resumed_file_keeps_its_bytes_and_identity_and_a_new_one_has_neither(tmp_path: Path) -> None:
    final = tmp_path / "d_1.tar"
    first = LtsWriter.open(final, 8, PLAIN, resume=True)
    first.write_at(0, [b"abcd"])
    first.checkpoint()
    first.close()
    second = LtsWriter.open(final, 8, PLAIN, resume=True)
    assert (first.resumed, second.resumed) == (False, True)
    assert (second.file_id, second.temporary) == (first.file_id, first.temporary)
    assert 0 <= second.file_id < 1 << 63
    second.close()
    third = LtsWriter.open(final, 9, PLAIN, resume=True)
    assert not third.resumed, "another planned size"
    fourth = LtsWriter.open(final, 9, PLAIN, resume=False)
    assert not fourth.resumed
    assert len({first.file_id, third.file_id, fourth.file_id}) == 3
    assert len(list(tmp_path.iterdir())) == 1, "each start removes what the ones before left"
    second_again = LtsWriter.open(tmp_path / "d_11.tar", 9, PLAIN, resume=True)
    assert not second_again.resumed, "another datablock's file"
    for writer in (third, fourth, second_again):
        writer.close()


_CHILD = """
import sys
from pathlib import Path
from mover.streams.lts_writer import LtsWriter
from tests.lts_mounts import PLAIN
writer = LtsWriter.open(Path(sys.argv[1]), 8, PLAIN, resume=False)
writer.write_at(0, [b"abcd"])
writer.checkpoint()
print(writer.file_id, flush=True)
sys.stdin.read()
"""


def test_what_a_killed_writer_checkpointed_is_there_for_the_next(tmp_path: Path) -> None:
    final = tmp_path / "d_1.tar"
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(final)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    file_id = int(child.stdout.readline())
    child.kill()
    assert child.wait() == -signal.SIGKILL
    child.communicate()
    assert visible(tmp_path) == []
    writer = LtsWriter.open(final, 8, PLAIN, resume=True)
    assert (writer.resumed, writer.file_id) == (True, file_id)
    writer.write_at(4, [b"efgh"])
    writer.commit()
    assert final.read_bytes() == b"abcdefgh"


def test_a_full_share_is_found_at_the_start_where_space_can_be_taken(tmp_path: Path) -> None:
    with small_mount(tmp_path / "share") as share:
        profile = probe_mount(share)
        assert profile.fallocate
        with pytest.raises(NotEnoughSpaceError) as caught:
            LtsWriter.open(share / "d_1.tar", 9 << 20, profile, resume=False)
        assert caught.value.exit_code is ExitCode.SPACE
        assert caught.value.needed_bytes == 9 << 20
        assert 0 < caught.value.free_bytes <= 8 << 20
        assert list(share.iterdir()) == [], "what was taken of too little is given back"


def test_a_share_that_fills_up_while_writing_is_exit_code_5_and_the_file_goes_on_later(tmp_path: Path) -> None:
    with small_mount(tmp_path / "share") as share:
        profile = PLAIN.__class__(
            rename=True, truncate=True, delete=True, fallocate=False, locks=True, o_direct=False, filesystem="tmpfs"
        )
        other = share / "other"
        other.write_bytes(bytes(5 << 20))
        writer = LtsWriter.open(share / "d_1.tar", 6 << 20, profile, resume=False)
        assert not writer.allocated
        data = random.Random(4).randbytes(6 << 20)
        with pytest.raises(NotEnoughSpaceError) as caught:
            writer.write_at(0, [data])
        assert caught.value.exit_code is ExitCode.SPACE
        assert "No space left on device" in str(caught.value)
        assert writer.written_bytes == 0
        other.unlink()
        writer.write_at(0, [data])
        writer.commit()
        assert (share / "d_1.tar").read_bytes() == data


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EROFS])
def test_failures_of_the_mount_name_the_file_and_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    writer = LtsWriter.open(tmp_path / "d_1.tar", 4, PLAIN, resume=False)

    def failing(*_args: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwritev", failing)
    with pytest.raises(LtsError, match=f"write .*d_1.*{errno.errorcode[number]}"):
        writer.write_at(0, [b"data"])
    writer.close()


def test_a_quota_is_a_lack_of_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LtsWriter.open(tmp_path / "d_1.tar", 4, PLAIN, resume=False)

    def failing(*_args: object) -> int:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "pwritev", failing)
    with pytest.raises(NotEnoughSpaceError, match="quota"):
        writer.write_at(0, [b"data"])
    writer.close()


def test_after_a_failed_sync_nothing_is_believed_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LtsWriter.open(tmp_path / "d_1.tar", 4, PLAIN, resume=False)
    writer.write_at(0, [b"data"])
    failures = [OSError(errno.EIO, os.strerror(errno.EIO))]

    def failing_once(fd: int) -> None:
        if failures:
            raise failures.pop()
        sync_data(fd)

    monkeypatch.setattr("mover.streams.lts_writer.sync_data", failing_once)
    for call in (writer.checkpoint, writer.checkpoint, writer.commit):
        with pytest.raises(LtsError):
            call()
    assert visible(tmp_path) == []
    writer.close()


def test_a_file_that_lost_its_length_is_not_committed(tmp_path: Path) -> None:
    writer = LtsWriter.open(tmp_path / "d_1.tar", 4, PLAIN, resume=False)
    writer.write_at(0, [b"data"])
    os.truncate(writer.temporary, 3)
    with pytest.raises(LayoutMismatchError):
        writer.commit()
    assert visible(tmp_path) == []
    writer.close()


def test_on_a_write_once_mount_the_final_name_is_used_at_once(tmp_path: Path) -> None:
    with write_once(tmp_path / "worm") as folder:
        profile = probe_mount(folder)
        final = folder / "d_1.tar"
        first = LtsWriter.open(final, 8, profile, resume=False)
        assert first.temporary == final
        first.write_at(0, [b"abcd"])
        first.checkpoint()
        first.close()
        second = LtsWriter.open(final, 8, profile, resume=True)
        assert (second.resumed, second.file_id) == (True, first.file_id)
        second.write_at(4, [b"efgh"])
        second.commit()
        assert final.read_bytes() == b"abcdefgh"
        third = LtsWriter.open(final, 6, profile, resume=True)
        assert not third.resumed
        third.close()
        assert final.read_bytes() == bytes(6)


def test_on_a_write_once_mount_a_file_closed_for_change_needs_an_administrator(tmp_path: Path) -> None:
    with write_once(tmp_path / "worm") as folder:
        profile = probe_mount(folder)
        final = folder / "d_1.tar"
        final.write_bytes(b"left")
        with closed_for_change(final), pytest.raises(WriteOnceError):
            LtsWriter.open(final, 4, profile, resume=True)


def test_without_truncate_a_left_file_is_resumed_or_refused_never_mixed(tmp_path: Path) -> None:
    profile = PLAIN.__class__(
        rename=False, truncate=False, delete=False, fallocate=False, locks=True, o_direct=False, filesystem=""
    )
    final = tmp_path / "d_1.tar"
    first = LtsWriter.open(final, 8, profile, resume=True)
    assert not first.resumed
    first.write_at(0, [b"abcd"])
    with pytest.raises(LayoutMismatchError):
        first.commit()
    first.close()
    second = LtsWriter.open(final, 8, profile, resume=True)
    assert second.resumed
    second.close()
    for size_bytes, resume in ((8, False), (3, True)):
        with pytest.raises(WriteOnceError, match="cannot be truncated"):
            LtsWriter.open(final, size_bytes, profile, resume=resume)
    assert final.read_bytes() == b"abcd"
