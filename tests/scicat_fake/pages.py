"""What an operator sees with a browser: datasets with their lifecycles, jobs with their statuses. Nothing to click."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import islice

from tests.scicat_fake.state import Document, State

__all__ = ["overview"]

_ROWS = 200
_STATUSES = ("archive status", "retrieve status")
_STYLE = (
    "body{font:15px system-ui,sans-serif;margin:2em;color:#222}table{border-collapse:collapse;margin-bottom:2em}"
    "th,td{text-align:left;padding:.3em .8em;border-bottom:1px solid #ddd;vertical-align:top}"
    "th{background:#f3f3f3;position:sticky;top:0}"
)


def overview(state: State) -> bytes:
    """The newest datasets and jobs, as a page that loads itself again.

    It is for everybody: results of jobs are not in it, they may have links to data.
    """
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="5">',
        f"<title>SciCat stand-in</title><style>{_STYLE}</style></head><body><h1>SciCat stand-in</h1>",
        *_table(
            "Datasets",
            ("dataset", "files", "bytes", "datablocks", "archivable", "retrievable", *_STATUSES, "changed"),
            len(state.datasets),
            (_of_dataset(state, dataset) for dataset in reversed(state.datasets.values())),
        ),
        *_table(
            "Jobs",
            ("job", "type", "status", "message", "datasets", "created", "changed"),
            len(state.jobs),
            (_of_job(job) for job in reversed(state.jobs.values())),
        ),
        "</body></html>",
    ]
    return "".join(parts).encode()


def _table(title: str, heads: Sequence[str], count: int, rows: Iterable[Sequence[object]]) -> Iterable[str]:
    newest = f", the newest {_ROWS}" if count > _ROWS else ""
    yield f"<h2>{title} ({count:,}{newest})</h2><table><tr>"
    yield from (f"<th>{head}</th>" for head in heads)
    yield "</tr>"
    for row in islice(rows, _ROWS):
        yield "<tr>" + "".join(f"<td>{escape(_text(value))}</td>" for value in row) + "</tr>"
    yield "</table>"


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _of_dataset(state: State, dataset: Document) -> Sequence[object]:
    lifecycle = dataset["datasetlifecycle"]
    return (
        dataset["pid"],
        f"{dataset['numberOfFiles']:,}",
        f"{dataset['size']:,}",
        f"{len(state.datablocks.get(dataset['pid'], {})):,}",
        lifecycle.get("archivable"),
        lifecycle.get("retrievable"),
        lifecycle.get("archiveStatusMessage"),
        lifecycle.get("retrieveStatusMessage"),
        dataset["updatedAt"],
    )


def _of_job(job: Document) -> Sequence[object]:
    pids = [str(item.get("pid")) for item in job["jobParams"].get("datasetList") or [] if isinstance(item, dict)]
    more = f" and {len(pids) - 5:,} more" if len(pids) > 5 else ""
    return (
        job["id"],
        job["type"],
        job["statusCode"],
        job["statusMessage"],
        ", ".join(pids[:5]) + more,
        job["createdAt"],
        job["updatedAt"],
    )
