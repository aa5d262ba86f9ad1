"""Progress in a pipe says what changes and no more; on a terminal it draws bars; with --json it keeps still."""

from __future__ import annotations

import io
from datetime import UTC, datetime

from mover.model import Progress, Stage
from mover.progress import BarDisplay, LineDisplay, SilentDisplay, open_display


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class _Clock:
    def __init__(self) -> None:
        self.moment_s = 0.0

    def __call__(self) -> float:
        return self.moment_s


def _lines(*events: tuple[float, Progress]) -> list[str]:
    out, clock = io.StringIO(), _Clock()
    display = LineDisplay(out, clock=clock, now=lambda: datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    with display:
        for moment_s, event in events:
            clock.moment_s = moment_s
            display.tell(event)
    return out.getvalue().splitlines()


def _moved(done_bytes: int, state: str = "progress", datablock: int = 1) -> Progress:
    assert state in {"started", "progress", "finished"}
    return Progress("a/b", Stage.MOVE, state, datablock, done_bytes, 100_000_000)  # type: ignore[arg-type]


def test_a_stage_has_a_line_at_its_begin_and_one_with_its_rate_at_its_end() -> None:
    assert _lines((0.0, _moved(0, "started")), (2.0, _moved(100_000_000, "finished"))) == [
        "2026-01-02T03:04:05Z a/b datablock 1: move begins (95.4 MiB)",
        "2026-01-02T03:04:05Z a/b datablock 1: move done (95.4 MiB in 2.00 s, 50.0 MB/s)",
    ]


def test_progress_in_between_is_told_every_ten_seconds_for_each_datablock() -> None:
    quarters = [(moment / 4, _moved(moment * 1_000_000)) for moment in range(1, 99)]
    lines = _lines((0.0, _moved(0, "started")), *quarters)
    assert [line.split(": ")[1].split(" (")[0] for line in lines] == ["move begins", "move 40%", "move 80%"]
    other = [(11.0, _moved(1, datablock=1)), (11.0, _moved(2, datablock=2))]
    assert len(_lines((0.0, _moved(0, "started", 1)), (0.0, _moved(0, "started", 2)), *other)) == 4


def test_a_wait_is_told_at_once_again_for_another_reason_and_then_every_ten_seconds() -> None:
    def waiting(reason: str) -> Progress:
        return Progress("a/b", Stage.SPACE, "waiting", 1, reason=reason)

    lines = _lines(
        (0.0, waiting("the LTS lacks 5 of 9 bytes")),
        (1.0, waiting("the LTS lacks 5 of 9 bytes (1 s)")),
        (2.0, waiting("the LTS lacks 4 of 9 bytes (2 s)")),
        (13.0, waiting("the LTS lacks 4 of 9 bytes (13 s)")),
    )
    assert [line.partition("waits: ")[2] for line in lines] == [
        "the LTS lacks 5 of 9 bytes",
        "the LTS lacks 4 of 9 bytes (2 s)",
        "the LTS lacks 4 of 9 bytes (13 s)",
    ]


def test_a_failure_is_told_with_its_reason_on_one_line() -> None:
    (line,) = _lines((0.0, Progress("a/b", Stage.VERIFY, "failed", 2, reason="bad\nnews \x1b[31m")))
    assert line == "2026-01-02T03:04:05Z a/b datablock 2: verify failed: bad\\nnews \\x1b[31m"


def test_a_terminal_gets_bars_and_a_pipe_lines_or_with_json_nothing() -> None:
    assert isinstance(open_display(quiet=True, stream=_Terminal()), BarDisplay)
    assert isinstance(open_display(quiet=False, stream=_Terminal()), BarDisplay)
    assert isinstance(open_display(quiet=False, stream=io.StringIO()), LineDisplay)
    assert isinstance(open_display(quiet=True, stream=io.StringIO()), SilentDisplay)


def test_bars_show_the_dataset_the_datablocks_in_flight_and_why_one_waits() -> None:
    out = _Terminal()
    display = BarDisplay(out)
    with display:
        display.tell(Progress("a/b", Stage.PLAN, "started"))
        display.tell(_moved(0, "started"))
        display.tell(_moved(50_000_000))
        display.tell(Progress("a/b", Stage.SPACE, "waiting", 2, reason="[red]no room"))
        display.note("[still] here")
    text = out.getvalue()
    for expected in ("a/b", "datablock 1", "move", "50.0/100.0 MB", "datablock 2", "[red]no room", "[still] here"):
        assert expected in text, expected


def test_bars_of_finished_datablocks_go_away() -> None:
    out = _Terminal()
    display = BarDisplay(out)
    for number in range(1, 50):
        display.tell(_moved(0, "started", number))
        display.tell(_moved(100_000_000, "finished", number))
    with display:
        pass
    assert "datablock" not in out.getvalue()
    assert "a/b" in out.getvalue()
