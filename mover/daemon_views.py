"""Rows of the journal, and what is known of work under way, in the words of the interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from mover.api import DatasetView, JobEvent, JobView, Transition
from mover.daemon_book import Item, Live
from mover.daemon_store_schema import ItemRow, JobRow, TransitionRow

__all__ = ["dataset_view", "end_event", "iso_ms", "job_view", "progress_event", "state_event"]


def iso_ms(time_ms: int) -> str:
    """A time, ISO 8601, UTC, with milliseconds; '' for 0."""
    if not time_ms:
        return ""
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def dataset_view(row: ItemRow, live: Live | None = None, report: dict[str, Any] | None = None) -> DatasetView:
    """A dataset; ``live`` is there while it is in work."""
    state, reason = row.state, row.reason
    if live is not None and live.begun:
        reason = live.waits_for
        state = "waiting" if reason else "running"
    work_done_bytes, work_total_bytes = live.amounts.total() if live is not None else (0, 0)
    return DatasetView(
        dataset_id=row.dataset_id,
        state=state,
        reason=reason,
        attempt=row.attempt,
        retry_at=iso_ms(row.retry_ms),
        stage=live.stage if live is not None else "",
        datablock=live.datablock if live is not None else 0,
        done_bytes=live.done_bytes if live is not None else 0,
        total_bytes=live.total_bytes if live is not None else 0,
        work_done_bytes=work_done_bytes,
        work_total_bytes=work_total_bytes,
        failure=row.failure,
        report=report,
    )


def job_view(
    row: JobRow,
    items: Sequence[ItemRow],
    live: Mapping[int, Live],
    transitions: Sequence[TransitionRow] = (),
    reports: Mapping[int, dict[str, Any]] | None = None,
) -> JobView:
    """A job; ``live`` and ``reports`` by position of the dataset."""
    found = reports or {}
    return JobView(
        id=row.id,
        kind=row.kind,
        state=row.state,
        reason=row.reason or next((item.reason for item in items if item.state == row.state), ""),
        owner=row.owner,
        priority=row.priority,
        options=row.options,
        accepted_at=iso_ms(row.accepted_ms),
        changed_at=iso_ms(row.changed_ms),
        datasets=tuple(dataset_view(item, live.get(item.position), found.get(item.position)) for item in items),
        key=row.key,
        catalogue_job=row.catalogue_job,
        transitions=tuple(_transition(transition) for transition in transitions),
    )


def _transition(row: TransitionRow) -> Transition:
    return Transition(iso_ms(row.at_ms), row.state, row.dataset_id, row.reason)


def state_event(row: TransitionRow) -> JobEvent:
    """The event of a change."""
    return JobEvent(row.number, row.job_id, "state", row.job_state, transition=_transition(row))


def end_event(job: JobRow) -> JobEvent:
    """The last event of a job that has ended."""
    return JobEvent(job.last_number + 1, job.id, "end", job.state)


def progress_event(item: Item, number: int) -> JobEvent:
    """How a dataset in work stands."""
    job = item.job.row
    return JobEvent(number, job.id, "progress", job.state, dataset=dataset_view(item.row, item.live))
