"""Progress as it is shown: bars on a terminal, lines with times in a pipe; on stderr, as stdout has the results."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from mover.amounts import WorkAmounts
from mover.model import Progress, Stage
from mover.shown import bytes_text, rate_text, seconds_text, shown_name

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

__all__ = ["BarDisplay", "Display", "LineDisplay", "SilentDisplay", "open_display"]

_LINE_EVERY_S = 10.0
_WORDS = {"started": "begins", "finished": "done", "failed": "failed", "waiting": "waits", "progress": ""}


class Display(Protocol):
    """Shows progress between ``__enter__`` and ``__exit__``; ``tell`` and ``note`` return at once."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def tell(self, event: Progress) -> None:
        """One event of the engine."""
        ...

    def note(self, text: str) -> None:
        """One line that is shown in any case."""
        ...


def open_display(*, quiet: bool, stream: TextIO | None = None) -> Display:
    """The display that fits stderr: bars on a terminal; otherwise lines, or when ``quiet`` nothing."""
    out = stream or sys.stderr
    if out.isatty():
        return BarDisplay(out)
    return SilentDisplay(out) if quiet else LineDisplay(out)


class _Plain:
    """A display without anything to open or to close."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.flush()

    def note(self, text: str) -> None:
        """See Display."""
        print(f"mover: {text}", file=self._stream, flush=True)


class SilentDisplay(_Plain):
    """Shows notes alone."""

    def tell(self, event: Progress) -> None:
        """See Display."""


class LineDisplay(_Plain):
    """A line when a stage begins, ends, fails or waits for something else than before, and now and then in between.

    ``clock`` gives seconds from any start, ``now`` the time of day.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        super().__init__(stream)
        self._clock, self._now = clock, now
        self._begun: dict[tuple[str, int, Stage], float] = {}
        self._last: dict[tuple[str, int, Stage], tuple[float, str]] = {}

    def tell(self, event: Progress) -> None:
        """See Display."""
        key, moment = (event.dataset_id, event.datablock, event.stage), self._clock()
        if event.state == "started":
            self._begun[key] = moment
        last_s, last_reason = self._last.get(key, (moment, "" if event.state == "progress" else "?"))
        reason = event.reason.partition(" (")[0]
        if event.state in {"progress", "waiting"} and reason == last_reason and moment - last_s < _LINE_EVERY_S:
            self._last.setdefault(key, (moment, reason))
            return
        self._last[key] = (moment, reason if event.state == "waiting" else "")
        elapsed_s = moment - self._begun.get(key, moment)
        if event.state in {"finished", "failed"}:
            self._begun.pop(key, None)
            self._last.pop(key, None)
        stamp = self._now().isoformat(timespec="seconds").replace("+00:00", "Z")
        print(f"{stamp} {_line(event, elapsed_s)}", file=self._stream, flush=True)


def _line(event: Progress, elapsed_s: float) -> str:
    where = shown_name(event.dataset_id) + (f" datablock {event.datablock}" if event.datablock else "")
    text = f"{where}: {event.stage} {_WORDS[event.state]}".rstrip()
    if event.state == "progress":
        share = 100 * event.done_bytes // max(event.total_bytes, 1)
        amounts = f"{bytes_text(event.done_bytes)} of {bytes_text(event.total_bytes)}"
        return f"{text} {share}% ({amounts}, {rate_text(event.done_bytes, elapsed_s)})"
    if event.state == "started" and event.total_bytes:
        return f"{text} ({bytes_text(event.total_bytes)})"
    if event.state == "finished" and event.total_bytes:
        rate = rate_text(event.total_bytes, elapsed_s)
        return f"{text} ({bytes_text(event.total_bytes)} in {seconds_text(elapsed_s)}, {rate})"
    return f"{text}: {shown_name(event.reason)}" if event.reason else text


class BarDisplay:
    """A line per dataset with all of its bytes, and a bar per datablock in flight with its stage.

    A byte of a datablock counts once when it is moved and once when it is read back.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bars = _make_bars(stream)
        self._datasets: dict[str, TaskID] = {}
        self._datablocks: dict[tuple[str, int], TaskID] = {}
        self._amounts = WorkAmounts()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def note(self, text: str) -> None:
        """See Display."""
        self._bars.console.print(f"mover: {text}")

    def tell(self, event: Progress) -> None:
        """See Display."""
        dataset = self._dataset(event.dataset_id)
        self._amounts.tell(event)
        if not event.datablock:
            self._bars.update(dataset, stage=_stage_text(event))
            return
        key = (event.dataset_id, event.datablock)
        if event.state in {"finished", "failed"}:
            if key in self._datablocks:
                self._bars.remove_task(self._datablocks.pop(key))
        else:
            bar = self._datablock(event, key)
            done_bytes = event.done_bytes if event.state == "progress" else None
            self._bars.update(bar, stage=_stage_text(event), completed=done_bytes, total=event.total_bytes or None)
        done_bytes, total_bytes = self._amounts.of(event.dataset_id)
        self._bars.update(dataset, completed=done_bytes, total=total_bytes or None, stage="")

    def _dataset(self, dataset_id: str) -> TaskID:
        if dataset_id not in self._datasets:
            name = shown_name(dataset_id)
            self._datasets[dataset_id] = self._bars.add_task(name, total=None, stage="")
        return self._datasets[dataset_id]

    def _datablock(self, event: Progress, key: tuple[str, int]) -> TaskID:
        if event.state == "started" and key in self._datablocks:
            self._bars.remove_task(self._datablocks.pop(key))  # a new bar: rates do not mix stages
        if key not in self._datablocks:
            name = f"  datablock {event.datablock}"
            self._datablocks[key] = self._bars.add_task(name, total=event.total_bytes or None, stage="")
        return self._datablocks[key]


def _stage_text(event: Progress) -> str:
    if event.state == "waiting":
        return f"{event.stage} waits: {shown_name(event.reason)}"
    return str(event.stage) if event.state != "failed" else f"{event.stage} failed"


def _make_bars(stream: TextIO) -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    console = Console(file=stream, markup=False, emoji=False, highlight=False)
    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[stage]}", markup=False),
        console=console,
        refresh_per_second=5,
        transient=True,
    )
