"""The words of the HTTP interface: what the daemon takes and tells, shared by the daemon and its clients. No I/O.

Times are ISO 8601, UTC, with milliseconds. Unknown fields of what comes in are refused; clients ignore those of what
they are told.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

__all__ = [
    "DatasetId",
    "DatasetView",
    "Failure",
    "JobEvent",
    "JobKind",
    "JobOptions",
    "JobOrder",
    "JobPage",
    "JobState",
    "JobView",
    "LimitView",
    "LimitsChange",
    "LimitsView",
    "Problem",
    "Transition",
    "is_final",
]

JobKind = Literal["archive", "retrieve", "verify", "plan"]
JobState = Literal["queued", "waiting", "running", "done", "failed", "cancelled"]
"""``waiting``: it was begun, and what it waits for is its ``reason``: a limit, space, a recall, another run, a time."""

DatasetId = Annotated[str, msgspec.Meta(min_length=1, max_length=1024, description="PID of a dataset")]
_Priority = Annotated[int, msgspec.Meta(ge=-100, le=100, description="within its owner's jobs; higher goes first")]
_Path = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]  # keys of S3 have 1,024 bytes at most
_Slots = Annotated[int, msgspec.Meta(ge=1, le=1024)]


def is_final(state: JobState) -> bool:
    """Whether nothing follows after the state."""
    return state in {"done", "failed", "cancelled"}


class JobOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a job; each belongs to the kind that is named, and is refused with another.

    archive: ``release_source``; ``registered``: only where the daemon registers datablocks with a catalogue. retrieve:
    ``files`` (of the one dataset), ``form``. verify: ``level``.
    """

    release_source: bool = False
    registered: bool = False
    files: Annotated[tuple[_Path, ...], msgspec.Meta(max_length=10_000)] = ()
    form: Literal["datablocks", "files"] = "datablocks"
    level: Literal["written", "read-back", "recalled"] = "read-back"


class JobOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An order. ``owner``: on whose account it runs, for the fair share; '' is the caller's own name."""

    kind: JobKind
    dataset_ids: Annotated[tuple[DatasetId, ...], msgspec.Meta(min_length=1, max_length=10_000)]
    options: JobOptions = JobOptions()
    priority: _Priority = 0
    owner: Annotated[str, msgspec.Meta(max_length=200)] = ""


class Failure(msgspec.Struct, frozen=True):
    """Why a dataset failed, as ``mover --json`` tells it.

    ``missing``, ``wrong_size``: paths of files that are not as the catalogue lists them, up to 10,000 each.
    """

    kind: str
    message: str
    exit_code: int
    retryable: bool
    fault: Literal["user", "system"]
    missing: tuple[str, ...] = ()
    wrong_size: tuple[str, ...] = ()


class DatasetView(msgspec.Struct, frozen=True):
    """One dataset of a job. ``report`` is the engine's, as ``mover --json`` has it, once it is done.

    ``done_bytes`` of ``total_bytes`` are of the datablock and stage that were told last; ``work_done_bytes`` of
    ``work_total_bytes`` of all the attempt has to do, where an archive counts every byte twice, moved and read back.
    """

    dataset_id: str
    state: JobState = "queued"
    reason: str = ""
    attempt: int = 0
    retry_at: str = ""
    stage: str = ""
    datablock: int = 0
    done_bytes: int = 0
    total_bytes: int = 0
    work_done_bytes: int = 0
    work_total_bytes: int = 0
    failure: Failure | None = None
    report: dict[str, Any] | None = None


class Transition(msgspec.Struct, frozen=True):
    """A change of state: of a dataset of the job, or of the job itself (``dataset_id`` '')."""

    at: str
    state: JobState
    dataset_id: str = ""
    reason: str = ""


class JobView(msgspec.Struct, frozen=True):
    """A job as it is now. ``transitions``: all its changes, oldest first; a listing leaves them and the reports out."""

    id: str
    kind: JobKind
    state: JobState
    reason: str
    owner: str
    priority: int
    options: JobOptions
    accepted_at: str
    changed_at: str
    datasets: tuple[DatasetView, ...]
    key: str = ""
    catalogue_job: str = ""  # the catalogue's job that it runs for
    transitions: tuple[Transition, ...] = ()


class JobPage(msgspec.Struct, frozen=True):
    """Jobs, newest first; ``next`` is the ``before`` of the next page, '' at the end."""

    jobs: tuple[JobView, ...]
    next: str = ""


class JobEvent(msgspec.Struct, frozen=True):
    """One event of a job's stream. ``number`` grows within a job and is the ``Last-Event-ID`` to go on after.

    ``state``: the change is in ``transition``. ``progress``: ``dataset`` is how it stands, without its report.
    ``end``: the last event of the job.
    """

    number: int
    job_id: str
    type: Literal["state", "progress", "end"]
    state: JobState
    transition: Transition | None = None
    dataset: DatasetView | None = None


class LimitView(msgspec.Struct, frozen=True):
    """One of the four limits: its slots, who holds one (datablocks), how many wait."""

    name: str
    slots: int
    holders: tuple[str, ...]
    waiting: int
    peak: int


class LimitsView(msgspec.Struct, frozen=True):
    """All limits, in the order of the documentation."""

    limits: tuple[LimitView, ...]


class LimitsChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """New numbers of slots; what is left out stays. Lowering lets running work finish."""

    LTS_FREE_LIMIT: _Slots | None = None
    MOVE_TO_LTS_LIMIT: _Slots | None = None
    VERIFY_LTS_LIMIT: _Slots | None = None
    LTS_TO_RETRIEVAL_LIMIT: _Slots | None = None


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error as RFC 9457 has it (``application/problem+json``); ``errors``: fields and what is wrong with them."""

    title: str
    status: int
    detail: str = ""
    type: str = "about:blank"
    instance: str = ""
    request_id: str = ""
    errors: tuple[dict[str, str], ...] = ()
