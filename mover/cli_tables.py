"""Reports as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mover.model import DatasetPlan
from mover.reports import ArchiveReport, ByteCounters, DatablockReport, DatasetListing, RetrieveReport, VerifyReport
from mover.shown import bytes_text, rate_text, seconds_text, shown_name

if TYPE_CHECKING:
    from rich.console import Console

    from mover.cli_estimate import Forecast

__all__ = [
    "print_listing",
    "print_plan",
    "print_retrieval",
    "print_run",
    "print_table",
]

_COUNTERS = (
    ("landing_zone_read_bytes", "read from the landing zone"),
    ("staging_written_bytes", "written to staging"),
    ("staging_read_bytes", "read from staging"),
    ("lts_written_bytes", "written to the LTS"),
    ("lts_read_bytes", "read back from the LTS"),
    ("retrieval_written_bytes", "written to the retrieval bucket"),
    ("scratch_payload_bytes", "payload on scratch"),
    ("reused_bytes", "reused from an earlier run"),
)
_ALWAYS = frozenset({"landing_zone_read_bytes", "lts_written_bytes", "lts_read_bytes", "scratch_payload_bytes"})
_SHOWN_ANOMALIES = 20


def print_table(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table whose first column is a text and whose columns marked with ``>`` are numbers."""
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_run(console: Console, report: ArchiveReport | VerifyReport) -> None:
    """What archiving or verifying one dataset did."""
    columns = ("datablock", ">members", ">size", "outcome", ">wait", ">move", ">verify", ">rate", "evidence", "digest")
    archived = isinstance(report, ArchiveReport)
    rows = [_run_row(item, archived=archived) for item in report.datablocks]
    verb = "archived" if archived else f"verified ({report.level})" if isinstance(report, VerifyReport) else ""
    title = f"{shown_name(report.dataset_id)}: {verb} in {seconds_text(report.elapsed_s)}"
    print_table(console, title, columns, rows)
    _print_counters(console, report.counters)
    if isinstance(report, ArchiveReport):
        _print_after_archive(console, report)
    elif len(report.datablocks) < report.datablock_count:
        told = f"{len(report.datablocks):,} of {report.datablock_count:,} datablocks are committed"
        console.print(f"  not archived whole: {told}", soft_wrap=True)


def _run_row(item: DatablockReport, *, archived: bool) -> tuple[str, ...]:
    return (
        item.name,
        f"{item.members:,}",
        f"{item.size_bytes:,}",
        item.outcome if archived else "agrees",
        seconds_text(item.wait_s),
        seconds_text(item.move_s),
        seconds_text(item.verify_s),
        rate_text(item.size_bytes if item.move_s or item.verify_s else 0, item.move_s or item.verify_s),
        item.evidence,
        item.digest,
    )


def _print_after_archive(console: Console, report: ArchiveReport) -> None:
    for anomaly in report.anomalies[:_SHOWN_ANOMALIES]:
        detail = f" ({anomaly.detail})" if anomaly.detail else ""
        console.print(f"  noticed: {anomaly.kind} {shown_name(anomaly.path)}{detail}", soft_wrap=True)
    if len(report.anomalies) > _SHOWN_ANOMALIES:
        console.print(f"  and {len(report.anomalies) - _SHOWN_ANOMALIES:,} more (--json has all)")
    if report.release is not None:
        console.print(f"  source released: {report.release.deleted:,} object(s) deleted")
        for path, reason in report.release.kept:
            console.print(f"  left alone: {shown_name(path)}: {reason}", soft_wrap=True)


def _print_counters(console: Console, counters: ByteCounters) -> None:
    parts = [
        f"{getattr(counters, name):,} {words}"
        for name, words in _COUNTERS
        if name in _ALWAYS or getattr(counters, name)
    ]
    console.print("  bytes: " + ", ".join(parts), soft_wrap=True)


def print_plan(console: Console, plan: DatasetPlan, forecast: Forecast, *, members: bool) -> None:
    """What archiving one dataset would write, and what that does to the LTS."""
    title = f"{shown_name(plan.dataset_id)}: {plan.file_count:,} file(s) in {len(plan.datablocks):,} datablock(s)"
    columns = ("datablock", ">members", ">payload", ">size")
    rows = [
        (item.name, f"{len(item.members):,}", f"{item.payload_bytes:,}", f"{item.size_bytes:,}")
        for item in plan.datablocks
    ]
    rows.append(("in all", f"{plan.file_count:,}", f"{plan.payload_bytes:,}", f"{plan.size_bytes:,}"))
    print_table(console, title, columns, rows)
    for line in forecast.lines():
        console.print(f"  {line}", soft_wrap=True)
    for anomaly in plan.anomalies[:_SHOWN_ANOMALIES]:
        detail = f" ({anomaly.detail})" if anomaly.detail else ""
        console.print(f"  noticed: {anomaly.kind} {shown_name(anomaly.path)}{detail}", soft_wrap=True)
    if members:
        for datablock in plan.datablocks:
            for member in datablock.members:
                line = f"{datablock.number}\t{member.size_bytes}\t{member.offset_bytes}\t{shown_name(member.path)}"
                console.out(line, highlight=False)


def print_listing(console: Console, listings: Sequence[DatasetListing]) -> None:
    """The datasets on the LTS."""
    columns = ("dataset", ">datablocks", ">files", ">payload", ">size", "archived")
    print_table(
        console,
        "",
        columns,
        (
            (
                shown_name(item.dataset_id),
                f"{item.datablocks:,}" + (f" of {item.datablock_count:,}" * (item.datablocks != item.datablock_count)),
                f"{item.file_count:,}",
                f"{item.payload_bytes:,}",
                f"{item.size_bytes:,}",
                item.problem or item.archived_at,
            )
            for item in listings
        ),
    )


def print_retrieval(console: Console, report: RetrieveReport) -> None:
    """What is in the retrieval bucket now; without the links, which go to stdout."""
    columns = ("object", ">size", "outcome", "sha256")
    title = f"{shown_name(report.dataset_id)}: {len(report.objects):,} object(s) in {seconds_text(report.elapsed_s)}"
    rows = [
        (shown_name(item.key), bytes_text(item.size_bytes), item.outcome, item.sha256 or "-") for item in report.objects
    ]
    print_table(console, title, columns, rows)
    _print_counters(console, report.counters)
    console.print(f"  the links are good until {report.expires_at}")
