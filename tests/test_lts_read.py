"""Reading back: from the storage and not from memory, to the last byte, never for ever."""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading
from pathlib import Path

import anyio
import pytest

from mover.errors import LayoutMismatchError, LtsError
from mover.policies.recall import RecallPolicy
from mover.streams import lts_read
from mover.streams.lts_mount import MEMORY_FILESYSTEMS, filesystem_of
from mover.streams.lts_read import LtsReader, open_when_online
from mover.streams.lts_writer import LtsWriter
from mover.streams.page_cache import drop_pages, resident_bytes
from tests.lts_mounts import PLAIN, small_mount

pytestmark = pytest.mark.anyio

SIZE = (9 << 20) + 4321
DATA = random.Random(5).randbytes(SIZE)
FAST = RecallPolicy(timeout_s=5, first_wait_s=0.001, longest_wait_s=0.01)


@pytest.fixture
def datablock(tmp_path: Path) -> Path:
    path = tmp_path / "d_1.tar"
    path.write_bytes(DATA)
    return path


async def _open(path: Path, size_bytes: int = SIZE) -> LtsReader:
    return await open_when_online(path, size_bytes, policy=FAST)


def _require_disk(path: Path) -> None:
    if filesystem_of(path) in MEMORY_FILESYSTEMS:
        pytest.skip("needs a temporary folder on a disk")


async def test_after_dropping_no_page_of_the_file_is_in_memory(datablock: Path) -> None:
    _require_disk(datablock)
    reader = await _open(datablock)
    with datablock.open("rb") as file:
        assert file.read() == DATA
        assert resident_bytes(file.fileno()) >= SIZE, "what was just read is in memory"
        assert reader.drop_cache() == reader.cache == "dropped"
        assert resident_bytes(file.fileno()) == 0
        buffer = bytearray(SIZE)
        reader.read_into(0, memoryview(buffer))
        assert buffer == DATA
        assert resident_bytes(file.fileno()) < SIZE, "nor does the check itself fill it"
    reader.close()


async def test_a_commit_leaves_the_datablock_out_of_memory(tmp_path: Path) -> None:
    _require_disk(tmp_path)
    writer = LtsWriter.open(tmp_path / "d_1.tar", SIZE, PLAIN, resume=False)
    writer.write_at(0, [DATA])
    writer.commit()
    with (tmp_path / "d_1.tar").open("rb") as file:
        assert resident_bytes(file.fileno()) == 0


async def test_unwritten_pages_are_written_before_they_are_dropped(datablock: Path) -> None:
    _require_disk(datablock)
    with datablock.open("r+b", buffering=0) as file:
        file.write(b"dirty")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        drop_pages(file.fileno())
        assert resident_bytes(file.fileno()) == 0
    assert datablock.read_bytes()[:5] == b"dirty"


async def test_pages_that_stay_are_gone_around(datablock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _require_disk(datablock)
    monkeypatch.setattr(lts_read, "resident_bytes", lambda _fd, **_options: 4096)
    reader = await _open(datablock)
    assert reader.drop_cache() == "direct"
    with datablock.open("rb") as file:
        drop_pages(file.fileno())
    generator = random.Random(6)
    ranges = [(0, SIZE), (SIZE - 1, 1), (1, 4096), (4096, 4096), (4 << 20, 1), (5, 0), (SIZE, 0)]
    ranges += [(start, generator.randrange(SIZE - start)) for start in generator.sample(range(SIZE), 10)]
    for start, length in ranges:
        blocking, patient = bytearray(length), bytearray(length)
        reader.read_into(start, memoryview(blocking))
        await reader.read(start, memoryview(patient), 5)
        assert blocking == patient == DATA[start : start + length]
    with datablock.open("rb") as file:
        assert resident_bytes(file.fileno()) == 0, "direct reads bring nothing into memory"
    reader.close()


async def test_a_mapping_that_pins_pages_is_noticed(datablock: Path) -> None:
    _require_disk(datablock)
    with datablock.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) > 0
        reader = await _open(datablock)
        assert reader.drop_cache() == "direct"
        buffer = bytearray(SIZE)
        reader.read_into(0, memoryview(buffer))
        assert buffer == DATA
        reader.close()


async def test_a_file_system_in_memory_is_reported_as_such(tmp_path: Path) -> None:
    with small_mount(tmp_path / "share", "16m") as share:
        (share / "d_1.tar").write_bytes(DATA)
        reader = await _open(share / "d_1.tar")
        assert reader.drop_cache() == "memory"
        buffer = bytearray(10)
        reader.read_into(5, memoryview(buffer))
        assert buffer == DATA[5:15]
        reader.close()


async def test_reads_past_the_end_and_of_a_file_that_was_cut_are_integrity_failures(datablock: Path) -> None:
    reader = await _open(datablock)
    with pytest.raises(LayoutMismatchError):
        reader.read_into(SIZE - 1, memoryview(bytearray(2)))
    with pytest.raises(LayoutMismatchError):
        await reader.read(-1, memoryview(bytearray(2)), 5)
    os.truncate(datablock, SIZE - 10)
    with pytest.raises(LayoutMismatchError):
        reader.read_into(0, memoryview(bytearray(SIZE)))
    with pytest.raises(LayoutMismatchError):
        await reader.read(SIZE - 5, memoryview(bytearray(5)), 5)
    reader.close()


async def test_not_now_is_asked_again_and_an_io_error_is_not(datablock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = await _open(datablock)
    real_preadv = os.preadv
    answers = [errno.EAGAIN, errno.EAGAIN]

    def answering(fd: int, buffers: list[memoryview], offset: int) -> int:
        if answers:
            number = answers.pop()
            raise OSError(number, os.strerror(number))
        return real_preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", answering)
    buffer = bytearray(100)
    await reader.read(7, memoryview(buffer), 5)
    assert buffer == DATA[7:107]
    answers.append(errno.EIO)
    with pytest.raises(LtsError, match="EIO"):
        await reader.read(7, memoryview(buffer), 5)
    answers[:] = [errno.EAGAIN] * 100_000
    with pytest.raises(LtsError, match=r"d_1\.tar: no byte for 0\.1 s"):
        await reader.read(7, memoryview(buffer), 0.1)
    reader.close()


async def test_a_stalled_read_is_left_behind_and_never_touches_the_buffer_again(
    datablock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = await _open(datablock)
    real_preadv, let_go, ended = os.preadv, threading.Event(), threading.Event()

    def stalling(fd: int, buffers: list[memoryview], offset: int) -> int:
        let_go.wait(10)
        try:
            return real_preadv(fd, buffers, offset)
        finally:
            ended.set()

    monkeypatch.setattr(os, "preadv", stalling)
    buffer = bytearray(5000)
    with pytest.raises(LtsError, match=r"d_1\.tar: no byte for 0\.05 s"):
        await reader.read(0, memoryview(buffer), 0.05)
    monkeypatch.setattr(os, "preadv", real_preadv)
    other = bytearray(5000)
    await reader.read(100, memoryview(other), 5)
    reader.close()
    let_go.set()
    await anyio.to_thread.run_sync(ended.wait, 5)
    assert buffer == bytes(5000)
    assert other == DATA[100:5100]


async def test_a_slow_read_that_keeps_coming_is_not_a_stall(datablock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = await _open(datablock)
    real_preadv, pause = os.preadv, threading.Event()

    def slow(fd: int, buffers: list[memoryview], offset: int) -> int:
        pause.wait(0.25)  # 3 pieces take longer together than the stall timeout allows for one
        return real_preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    buffer = bytearray(SIZE)
    await reader.read(0, memoryview(buffer), 0.6)
    assert buffer == DATA
    reader.close()
