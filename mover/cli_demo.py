"""The command of the demonstration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mover.cli_run import Outcome, Session
from mover.cli_tables import print_table
from mover.demo import DATASET_ID, DemoReport, run_demo
from mover.errors import DigestMismatchError
from mover.shown import rate_text, seconds_text, shown_name

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["demo"]

_SMALL_TARGET_BYTES = 1 << 20
_SHOWN = 20


async def demo(session: Session, folder: Path | None, *, keep: bool) -> Outcome:
    """Runs the demonstration; differences are an integrity failure."""
    settings = session.settings
    target_bytes = settings.archiver_target_size_mb << 20
    if folder is None and settings.origins["ARCHIVER_TARGET_SIZE_MB"] == "default":
        target_bytes = _SMALL_TARGET_BYTES  # several datablocks from the small folder
    report = await run_demo(
        folder,
        target_bytes=target_bytes,
        buffer_bytes=settings.mover_buffer_mb << 20,
        keep=keep,
        tell=session.display.tell,
    )
    failures: tuple[tuple[str, Exception], ...] = ()
    if report.differences:
        found = "; ".join(report.differences[:_SHOWN])
        error = DigestMismatchError(f"{len(report.differences):,} file(s)", "content", "the source's", found, "unknown")
        failures = ((DATASET_ID, error),)
    return Outcome({"demo": report}, lambda console: _show(console, report, keep=keep), failures)


def _show(console: Console, report: DemoReport, *, keep: bool) -> None:
    for name, reason in report.skipped[:_SHOWN]:
        console.print(f"skipped: {shown_name(name)}: {reason}", soft_wrap=True)
    if len(report.skipped) > _SHOWN:
        console.print(f"skipped: {len(report.skipped) - _SHOWN:,} more")
    if report.empty_folders:
        console.print(f"{report.empty_folders:,} empty folder(s) have no objects and so do not come back")
    rows = [
        (
            step.name,
            step.what,
            f"{step.size_bytes:,}",
            seconds_text(step.elapsed_s),
            rate_text(step.size_bytes, step.elapsed_s),
        )
        for step in report.steps
    ]
    print_table(console, f"{shown_name(report.folder)}", ("step", "", ">bytes", ">time", ">rate"), rows)
    verdict = "NOT identical" if report.differences else "byte-identical"
    files = f"{report.file_count:,} file(s), {report.payload_bytes:,} bytes"
    console.print(f"{files}: {verdict} after the way there and back, {seconds_text(report.elapsed_s)} in all")
    if keep and report.datablocks:
        first = report.datablocks[0]
        console.print(f"LTS:       {report.workplace}/lts", soft_wrap=True)
        console.print(f"unpacked:  {report.workplace}/unpacked", soft_wrap=True)
        console.print(f"try:       tar tf {first}", soft_wrap=True)
        console.print(f"           python3 -m json.tool {first}.manifest.json | less", soft_wrap=True)
        console.print(f"           rm -r {report.workplace}", soft_wrap=True)
