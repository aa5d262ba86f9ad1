"""The tables of the daemon's journal and their rows. Times are milliseconds since 1970, UTC.

``jobs``: one row each, its state as it follows from its datasets. ``items``: one dataset of a job. ``transitions``:
every change, numbered as the job's events are. ``reports``: what the engine told of a dataset that is done, compressed;
they hold links, which are secrets.
"""

from __future__ import annotations

from typing import Final

import msgspec

from mover.api import Failure, JobKind, JobOptions, JobState

__all__ = ["SCHEMA", "SCHEMA_VERSION", "Changes", "ItemRow", "JobRow", "NewJob", "TransitionRow"]

SCHEMA_VERSION: Final = 1

SCHEMA: Final = """
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, owner TEXT NOT NULL, priority INTEGER NOT NULL, options TEXT NOT NULL,
    accepted_ms INTEGER NOT NULL, changed_ms INTEGER NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL,
    key TEXT NOT NULL, catalogue_job TEXT NOT NULL, cancelled_by TEXT NOT NULL, last_number INTEGER NOT NULL,
    caller TEXT NOT NULL, digest BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX jobs_by_key ON jobs (caller, key) WHERE key <> '';
CREATE INDEX jobs_by_state ON jobs (state, id);
CREATE INDEX jobs_by_owner ON jobs (owner, id);
CREATE INDEX jobs_by_end ON jobs (changed_ms) WHERE state IN ('done', 'failed', 'cancelled');
CREATE TABLE items (
    job_id TEXT NOT NULL, position INTEGER NOT NULL, dataset_id TEXT NOT NULL, state TEXT NOT NULL,
    reason TEXT NOT NULL, attempt INTEGER NOT NULL, failures INTEGER NOT NULL, retry_ms INTEGER NOT NULL,
    failure TEXT NOT NULL, outcome TEXT NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (job_id, position)
) STRICT, WITHOUT ROWID;
CREATE INDEX items_by_dataset ON items (dataset_id, job_id);
CREATE TABLE transitions (
    job_id TEXT NOT NULL, number INTEGER NOT NULL, at_ms INTEGER NOT NULL, state TEXT NOT NULL,
    dataset_id TEXT NOT NULL, reason TEXT NOT NULL, job_state TEXT NOT NULL, PRIMARY KEY (job_id, number)
) STRICT, WITHOUT ROWID;
CREATE TABLE reports (
    job_id TEXT NOT NULL, position INTEGER NOT NULL, size_bytes INTEGER NOT NULL, body BLOB NOT NULL,
    UNIQUE (job_id, position)
) STRICT;
"""


class JobRow(msgspec.Struct, frozen=True):
    """A job as it is kept. ``last_number``: of its last event; ``cancelled_by``: '' while nobody wants it ended."""

    id: str
    kind: JobKind
    owner: str
    priority: int
    options: JobOptions
    accepted_ms: int
    changed_ms: int
    state: JobState
    reason: str
    key: str
    catalogue_job: str
    cancelled_by: str
    last_number: int


class NewJob(msgspec.Struct, frozen=True):
    """A job to be accepted; ``digest`` tells orders apart, ``caller`` is whose keys are compared."""

    row: JobRow
    dataset_ids: tuple[str, ...]
    caller: str
    digest: bytes


class ItemRow(msgspec.Struct, frozen=True, gc=False):
    """A dataset of a job. ``failures``: in a row; ``retry_ms`` 0: none is due; ``outcome``: for the catalogue, JSON.

    ``number``: the job's last one as it was changed; an older change that is written late does not undo it. There are
    many, and no rings among them: the garbage collector, which holds the loop up, need not look at them.
    """

    job_id: str
    position: int
    dataset_id: str
    state: JobState = "queued"
    reason: str = ""
    attempt: int = 0
    failures: int = 0
    retry_ms: int = 0
    failure: Failure | None = None
    outcome: str = ""
    number: int = 0


class TransitionRow(msgspec.Struct, frozen=True, gc=False):
    """A change; ``job_state`` is what the job is after it."""

    job_id: str
    number: int
    at_ms: int
    state: JobState
    dataset_id: str
    reason: str
    job_state: JobState


class Changes(msgspec.Struct, frozen=True):
    """What became of some datasets of a job, written together. ``report``: of the first of them, compressed."""

    job_id: str
    state: JobState
    reason: str
    changed_ms: int
    last_number: int
    items: tuple[ItemRow, ...]
    transitions: tuple[TransitionRow, ...]
    report: bytes = b""
    report_bytes: int = 0
