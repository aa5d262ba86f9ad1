"""What the daemon's jobs are configured with, and what is told of all of them together."""

from __future__ import annotations

from pathlib import Path

import msgspec

from mover.api import DatasetView, JobKind
from mover.policies.retry import RetryPolicy

__all__ = ["JobServiceConfig", "OwnerStatistics", "QueueStatistics", "WorkView"]


class JobServiceConfig(msgspec.Struct, frozen=True):
    """``folder`` is made when missing, for the daemon alone: ``<ARCHIVER_SCRATCH_FOLDER>/daemon``.

    ``jobs_limit`` and ``datasets_limit``: unfinished ones that are held at most; a file that an order names counts as
    a dataset, a long name as one for each 1,024 characters. ``datasets_at_a_time``: of each kind of job, so that
    archivals that wait for space hold up no retrieval. ``keep_days``: how long finished jobs are kept. ``retry``: a
    dataset whose failure passes. ``busy_patience_s``: how long a dataset waits for a run elsewhere.
    ``report_limit_bytes``: of the JSON of one dataset's report; what goes beyond it is left out and counted there.
    """

    folder: Path
    jobs_limit: int = 10_000
    datasets_limit: int = 100_000
    datasets_at_a_time: int = 4
    keep_days: float = 30.0
    retry: RetryPolicy = RetryPolicy(attempts=8, base_s=5.0, cap_s=600.0, throttle_base_s=30.0)
    busy_patience_s: float = 86_400.0
    report_limit_bytes: int = 8 << 20


class OwnerStatistics(msgspec.Struct, frozen=True):
    """Unfinished datasets of one owner."""

    owner: str
    queued: int
    waiting: int
    running: int


class WorkView(msgspec.Struct, frozen=True):
    """A dataset in work; ``since`` is when its attempt began."""

    job_id: str
    kind: JobKind
    owner: str
    dataset: DatasetView
    since: str


class QueueStatistics(msgspec.Struct, frozen=True):
    """The queue now, and what happened since the service was opened.

    Numbers of datasets, but for ``jobs`` and ``accepted``. ``oldest_age_s``: since the oldest job of which no
    dataset was ever begun was accepted; 0 when there is none. ``ended``: datasets by (kind, final state). ``retries``:
    failures that are tried again, by the error's kind. ``journal_error``: why the last write failed, else ''.
    """

    jobs: int
    queued: int
    waiting: int
    running: int
    oldest_age_s: float
    owners: tuple[OwnerStatistics, ...]
    working: tuple[WorkView, ...]
    accepted: int
    ended: dict[tuple[str, str], int]
    retries: dict[str, int]
    jobs_limit: int
    datasets_limit: int
    intake_open: bool
    journal_error: str = ""
