"""Recall: the pure decisions, and waiting for files that look empty, are refused, block, or come back."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from mover.errors import LayoutMismatchError, LtsError, RecallTimeoutError
from mover.policies.recall import RecallPolicy, Residency, residency
from mover.streams import lts_read
from mover.streams.lts_read import open_when_online

pytestmark = pytest.mark.anyio

CONTENT = b"tar" * 1000


class Tape:
    """Virtual time: each sleep advances the clock and runs the next step of the tape system."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self.now = 0.0
        self.steps = list(steps)
        self.waits: list[float] = []
        self.reasons: list[str] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.waits.append(seconds)
        if self.steps:
            await anyio.to_thread.run_sync(self.steps.pop(0))

    def on_wait(self, reason: str, _waited_s: float) -> None:
        self.reasons.append(reason)


async def _open(path: Path, tape: Tape, policy: RecallPolicy | None = None) -> lts_read.LtsReader:
    return await open_when_online(
        path, len(CONTENT), policy=policy or RecallPolicy(), clock=tape.clock, sleep=tape.sleep, on_wait=tape.on_wait
    )


def test_a_stat_tells_the_four_cases_apart() -> None:
    assert residency(10, 8, 10) is Residency.ONLINE
    assert residency(10, 0, 10) is Residency.OFFLINE
    assert residency(0, 0, 10) is Residency.EMPTY
    assert residency(9, 8, 10) is Residency.EMPTY
    assert residency(0, 0, 0) is Residency.ONLINE


def test_waits_double_up_to_the_longest_and_end_at_the_deadline() -> None:
    policy = RecallPolicy(timeout_s=70)
    waited_s, waits = 0.0, []
    for attempt in range(1, 100):
        wait_s = policy.wait_s(attempt, waited_s)
        if wait_s is None:
            break
        waits.append(wait_s)
        waited_s += wait_s
    assert waits == [1, 2, 4, 8, 16, 30, 9]
    assert RecallPolicy(timeout_s=1e9).wait_s(10_000, 0) == 30


async def test_a_file_that_is_online_opens_at_once_and_was_not_offline(tmp_path: Path) -> None:
    path = tmp_path / "block.tar"
    path.write_bytes(CONTENT)
    tape = Tape()
    reader = await _open(path, tape)
    assert (reader.was_offline, tape.waits, reader.cache) == (False, [], "")
    reader.close()
    reader.close()


async def test_a_stub_that_looks_empty_then_short_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "block.tar"
    path.write_bytes(b"")
    tape = Tape(lambda: None, lambda: path.write_bytes(CONTENT[:100]), lambda: path.write_bytes(CONTENT))
    reader = await _open(path, tape)
    assert reader.was_offline
    assert tape.waits == [1, 2, 4]
    assert tape.reasons[0] == "looks empty: 0 of 3,000 bytes"
    assert tape.reasons[2] == "looks empty: 100 of 3,000 bytes"
    reader.close()


async def test_a_sparse_file_is_no_stub(tmp_path: Path) -> None:
    path = tmp_path / "block.tar"
    path.touch()
    os.truncate(path, len(CONTENT))
    assert path.stat().st_blocks == 0
    reader = await _open(path, Tape())
    assert not reader.was_offline
    reader.close()


async def test_a_stub_whose_first_read_fills_it_was_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "block.tar"
    path.touch()
    os.truncate(path, len(CONTENT))
    real_preadv = os.preadv

    def recalling(fd: int, buffers: list[bytearray], offset: int) -> int:
        path.write_bytes(CONTENT)
        return real_preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", recalling)
    reader = await _open(path, Tape())
    assert reader.was_offline
    reader.close()


@pytest.mark.parametrize(
    ("number", "was_offline"), [(errno.EAGAIN, True), (errno.EIO, False), (errno.ESTALE, False)], ids=str
)
async def test_refusals_are_waited_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, was_offline: bool
) -> None:
    path = tmp_path / "block.tar"
    path.write_bytes(CONTENT)
    real_preadv, refusals = os.preadv, [number] * 3

    def refusing(fd: int, buffers: list[bytearray], offset: int) -> int:
        if refusals:
            code = refusals.pop()
            raise OSError(code, os.strerror(code))
        return real_preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refusing)
    tape = Tape()
    reader = await _open(path, tape)
    assert (tape.waits, reader.was_offline) == ([1, 2, 4], was_offline)
    assert tape.reasons[0].startswith("refused: ")
    reader.close()


async def test_a_file_that_stays_empty_times_out_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "block.tar"
    path.touch()
    tape = Tape()
    with pytest.raises(RecallTimeoutError, match=r"no byte after 300 s.*looks empty"):
        await _open(path, tape)
    assert sum(tape.waits) == 300


async def test_a_file_that_stays_short_is_an_integrity_failure(tmp_path: Path) -> None:
    path = tmp_path / "block.tar"
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(LayoutMismatchError, match="2999"):
        await _open(path, Tape())


async def test_a_longer_file_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "block.tar"
    path.write_bytes(CONTENT + b"x")
    tape = Tape()
    with pytest.raises(LayoutMismatchError, match="3001"):
        await _open(path, tape)
    assert tape.waits == []


async def test_a_missing_file_is_not_waited_for(tmp_path: Path) -> None:
    tape = Tape()
    with pytest.raises(LtsError, match="ENOENT"):
        await _open(tmp_path / "block.tar", tape)
    assert tape.waits == []


async def test_a_read_that_blocks_is_reported_then_left_behind_and_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fifo = tmp_path / "block.tar"
    os.mkfifo(fifo)  # opening it blocks until somebody writes
    monkeypatch.setattr(lts_read, "_REPORT_EVERY_S", 0.05)
    reasons: list[str] = []
    other = tmp_path / "other.tar"
    other.write_bytes(CONTENT)
    opened: list[float] = []

    async def open_other() -> None:
        reader = await open_when_online(other, len(CONTENT), policy=RecallPolicy())
        opened.append(time.monotonic())
        reader.close()

    began = time.monotonic()
    policy = RecallPolicy(timeout_s=0.3, first_wait_s=0.01)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(open_other)
        with pytest.raises(RecallTimeoutError, match="blocks"):
            await open_when_online(fifo, 10, policy=policy, on_wait=lambda reason, _s: reasons.append(reason))
    assert 0.3 <= time.monotonic() - began < 3
    assert opened[0] - began < 0.3
    assert "the read of the first byte blocks" in reasons
    fd = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)  # lets the thread go
    os.close(fd)
