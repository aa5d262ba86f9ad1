"""What a run leaves in Prefect's UI: tables of datablocks, links to a retrieval and its download script."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Sequence
from typing import Any, Final

from prefect.artifacts import acreate_markdown_artifact, acreate_table_artifact

from flows.progress import run_logger
from mover.model import DatasetPlan
from mover.reports import ArchiveReport, DatablockReport, RetrieveReport, VerifyReport
from mover.shown import bytes_text

__all__ = ["show_datablocks", "show_links", "show_plan", "show_table"]

_MOST_ROWS: Final = 500
_SCRIPT_LIMIT_BYTES: Final = 256 << 10


async def show_plan(plan: DatasetPlan) -> None:
    """The datablocks that archiving would write."""
    rows = [
        {
            "datablock": item.name,
            "files": len(item.members),
            "bytes": item.size_bytes,
            "size": bytes_text(item.size_bytes),
        }
        for item in plan.datablocks
    ]
    await show_table(f"plan-{_slug(plan.dataset_id)}", f"What archiving {plan.dataset_id} would write", rows)


async def show_datablocks(report: ArchiveReport | VerifyReport) -> None:
    """The datablocks of a dataset with times and proof."""
    rows = [_row(item) for item in report.datablocks]
    await show_table(f"datablocks-{_slug(report.dataset_id)}", f"Datablocks of {report.dataset_id}", rows)


def _row(item: DatablockReport) -> dict[str, Any]:
    return {
        "datablock": item.name,
        "files": item.members,
        "size": bytes_text(item.size_bytes),
        "outcome": item.outcome,
        "evidence": item.evidence,
        "digest": item.digest,
        "waited s": round(item.wait_s, 1),
        "moved s": round(item.move_s, 1),
        "read back s": round(item.verify_s, 1),
    }


async def show_links(report: RetrieveReport) -> None:
    """Links and download script of a retrieval: until they expire they open the data to everybody who sees them."""
    rows = [
        {
            "object": item.key.rpartition("/")[2],
            "size": bytes_text(item.size_bytes),
            "sha256": item.sha256,
            "link": item.url,
        }
        for item in report.objects
    ]
    title = f"Links to {report.dataset_id}, until {report.expires_at}"
    await show_table(f"links-{_slug(report.dataset_id)}", title, rows)
    if len(report.script) <= _SCRIPT_LIMIT_BYTES:
        text = f"`bash` downloads, checks and unpacks:\n\n```bash\n{report.script}\n```\n"
        await _quietly(
            acreate_markdown_artifact(
                key=f"download-{_slug(report.dataset_id)}",
                markdown=text,
                description=f"Download script of {report.dataset_id}, until {report.expires_at}",
            )
        )


async def show_table(key: str, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """A table under a key of lower-case letters, digits and dashes; it is cut when it is very long."""
    cut = f" (the first {_MOST_ROWS} of {len(rows):,})" if len(rows) > _MOST_ROWS else ""
    await _quietly(acreate_table_artifact(key=key, table=list(rows[:_MOST_ROWS]), description=title + cut))


async def _quietly(writing: Awaitable[object]) -> None:
    """Artifacts are for looking at: one that cannot be written does not fail the run."""
    try:
        await writing
    except Exception as error:  # noqa: BLE001 - whatever the server's trouble is
        run_logger().warning("an artifact is missing: %s", type(error).__name__)


def _slug(dataset_id: str) -> str:
    """A dataset's id in the letters that an artifact's key may have."""
    return re.sub(r"[^a-z0-9]+", "-", dataset_id.lower()).strip("-")
