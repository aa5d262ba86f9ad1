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
_PAGE_BYTES: Final = 8 << 20  # of a page's JSON
_PATHS: Final = 20_000  # of failures, in one job: all of one
_SHOWN_FILES: Final = 20
_SHOWN_FILES_BYTES: Final = 4096
_SHOWN_CHARACTERS: Final = 1000  # of a reason


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

    Of the files that were ordered the first few are told, of those that failures name none, of long reasons the
    beginning. A page ends early when it comes to more than 10,000 datasets or 8 MiB, but has one job.
    """
    left_datasets, left_bytes = _PAGE_DATASETS, _PAGE_BYTES
    page: list[JobView] = []
    for row, items in read_jobs(connection, where, before, limit + 1):
        view = _short(job_view(row, items, live.get(row.id, {})))
        left_datasets -= len(items)
        left_bytes -= len(msgspec.json.encode(view))
        if page and (len(page) == limit or left_datasets < 0 or left_bytes < 0):
            return JobPage(tuple(page), page[-1].id)
        page.append(view)
    return JobPage(tuple(page))


def _short(job: JobView) -> JobView:
    left_bytes = _SHOWN_FILES_BYTES
    files: list[str] = []
    for path in job.options.files[:_SHOWN_FILES]:
        left_bytes -= len(path.encode())
        if files and left_bytes < 0:
            break
        files.append(path)
    options = msgspec.structs.replace(job.options, files=tuple(files))
    datasets = tuple(_short_dataset(dataset) for dataset in job.datasets)
    return msgspec.structs.replace(job, options=options, datasets=datasets, reason=_cut(job.reason))


def _short_dataset(dataset: DatasetView) -> DatasetView:
    failure = dataset.failure
    if len(dataset.reason) <= _SHOWN_CHARACTERS and (failure is None or len(failure.message) <= _SHOWN_CHARACTERS):
        return dataset
    if failure is not None:
        failure = msgspec.structs.replace(failure, message=_cut(failure.message))
    return msgspec.structs.replace(dataset, reason=_cut(dataset.reason), failure=failure)


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} ..."
