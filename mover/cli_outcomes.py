"""What commands tell at their end, wherever the work was done: here or in the daemon."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mover.cli_estimate import Forecast
from mover.cli_run import Outcome
from mover.cli_tables import print_plan, print_retrieval, print_run
from mover.model import DatasetPlan
from mover.reports import ArchiveReport, RetrieveReport, VerifyReport

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Failures", "planned", "retrieved", "worked"]

Failures = tuple[tuple[str, Exception], ...]
"""Datasets that are not done, and why."""


def planned(items: Sequence[tuple[DatasetPlan, Forecast]], failures: Failures, *, members: bool) -> Outcome:
    """Of plans."""

    def show(console: Console) -> None:
        for plan, expected in items:
            print_plan(console, plan, expected, members=members)

    return Outcome({"datasets": [_plan_document(*item, members=members) for item in items]}, show, failures)


def _plan_document(plan: DatasetPlan, expected: Forecast, *, members: bool) -> dict[str, Any]:
    datablocks = [
        {
            "number": item.number,
            "name": item.name,
            "members": item.members if members else len(item.members),
            "payload_bytes": item.payload_bytes,
            "size_bytes": item.size_bytes,
        }
        for item in plan.datablocks
    ]
    document = {name: getattr(plan, name) for name in ("dataset_id", "fingerprint", "file_count")}
    document |= {"payload_bytes": plan.payload_bytes, "size_bytes": plan.size_bytes}
    return document | {"anomalies": plan.anomalies, "datablocks": datablocks, "forecast": expected}


def worked(
    reports: Sequence[ArchiveReport | VerifyReport], failures: Failures, word: str, notes: Sequence[str] = ()
) -> Outcome:
    """Of archiving or verifying; ``word`` is what was done. ``notes`` follow the tables."""

    def show(console: Console) -> None:
        for report in reports:
            print_run(console, report)
        for note in notes:
            console.print(f"  {note}", soft_wrap=True)
        done, failed = len(reports), len(failures)
        if done + failed > 1:
            told = f"{done:,} of {done + failed:,} dataset(s) {word}"
            console.print(told + (f", {failed:,} failed" if failed else ""))

    return Outcome({"datasets": list(reports)}, show, failures)


def retrieved(report: RetrieveReport, script: Path | None, more: Mapping[str, object] | None = None) -> Outcome:
    """Of a retrieval: links on stdout, one a line, for programs; everything else beside them."""

    def show(_: Console) -> None:
        from rich.console import Console

        beside = Console(
            stderr=True, markup=False, emoji=False, highlight=False, width=None if sys.stderr.isatty() else 200
        )
        print_retrieval(beside, report)
        if script is not None:
            beside.print(f"  the download script is {script} (run it with sh; it holds the links: keep it to yourself)")
        for item in report.objects:
            sys.stdout.write(f"{item.url}\n")

    return Outcome({"dataset": report, **(more or {})}, show)
