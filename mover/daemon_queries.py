"""Jobs as the interface tells them, read from the journal in one step. Everything here blocks."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from mover.api import DatasetView, JobPage, JobView
from mover.daemon_book import Live
from mover.daemon_store_rows import read_item, read_items, read_job, read_jobs, read_reports, read_transitions
from mover.daemon_views import dataset_view, job_view

__all__ = ["read_dataset_view", "read_job_view", "read_page"]

_REPORTS_BYTES: Final = 8 << 20
_PAGE_DATASETS: Final = 10_000
_PATHS: Final = 20_000  # of failures, in one job: all of one
_SHOWN_FILES: Final = 20


def read_job_view(connection: sqlite3.Connection, job_id: str, live: Mapping[int, Live]) -> JobView:
    """One job with its changes, reports as far as 8 MiB go, the first one always, and some files of its failures.

    Raises:
        UnknownJobError: there is none.
    """
    row = read_job(connection, job_id)
    reports = {
        position: msgspec.json.decode(body) for position, body in read_reports(connection, job_id, _REPORTS_BYTES)
    }
    items = read_items(connection, job_id, _PATHS)
    return job_view(row, items, live, read_transitions(connection, job_id), reports)


def read_dataset_view(
    connection: sqlite3.Connection, job_id: str, dataset_id: str, live: Mapping[int, Live]
) -> DatasetView:
    """One dataset of a job with its report.  Raises UnknownJobError."""
    read_job(connection, job_id)
    row = read_item(connection, job_id, dataset_id)
    reports = [msgspec.json.decode(body) for _, body in read_reports(connection, job_id, 0, row.position)]
    return dataset_view(row, live.get(row.position), reports[0] if reports else None)


def read_page(
    connection: sqlite3.Connection,
    where: Sequence[tuple[str, str]],
    before: str,
    limit: int,
    live: Mapping[str, Mapping[int, Live]],
) -> JobPage:
    """Jobs, newest first; ``where`` as ``read_jobs`` has it, ``live`` by job and position.

    Of the files that were ordered the first few are told, of those that failures name none.
    """
    rows, following = read_jobs(connection, where, before, limit, _PAGE_DATASETS)
    return JobPage(tuple(_short(job_view(row, items, live.get(row.id, {}))) for row, items in rows), following)


def _short(job: JobView) -> JobView:
    if len(job.options.files) <= _SHOWN_FILES:
        return job
    options = msgspec.structs.replace(job.options, files=job.options.files[:_SHOWN_FILES])
    return msgspec.structs.replace(job, options=options)
