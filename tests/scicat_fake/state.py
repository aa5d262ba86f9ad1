"""What the server remembers: accounts, documents, switches, faults, and what happened."""

from __future__ import annotations

import secrets
import time
import uuid
from collections import deque
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

__all__ = [
    "ADMIN",
    "CREATE_DATASET",
    "CREATE_JOB",
    "CREATE_OWN",
    "DELETE",
    "LIFECYCLE",
    "UPDATE_JOB",
    "Account",
    "Change",
    "Document",
    "Fault",
    "LoggedRequest",
    "State",
    "Switches",
    "new_id",
    "now",
    "utc",
]

Document = dict[str, Any]

# What the groups of an account give; a real server reads them from the environment.
ADMIN = "admin"  # ADMIN_GROUPS
DELETE = "delete"  # DELETE_GROUPS
UPDATE_JOB = "update_job"  # UPDATE_JOB_PRIVILEGED_GROUPS
CREATE_JOB = "create_job"  # CREATE_JOB_PRIVILEGED_GROUPS
LIFECYCLE = "lifecycle"  # UPDATE_DATASET_LIFECYCLE_GROUPS
CREATE_DATASET = "create_dataset"  # CREATE_DATASET_PRIVILEGED_GROUPS
CREATE_OWN = "create_own"  # CREATE_DATASET_GROUPS

BODY_LIMIT_BYTES = 16 * 1024 * 1024
_LOG_LENGTH = 100_000


class Account(msgspec.Struct):
    """A functional account. ``rights``: names of the constants above; ``groups``: where it is a member."""

    username: str
    password: str
    rights: set[str] = msgspec.field(default_factory=lambda: {ADMIN, DELETE})
    groups: set[str] = msgspec.field(default_factory=set)
    email: str = "somebody@facility.example"

    def __repr__(self) -> str:
        return f"Account({self.username!r})"


class Switches(msgspec.Struct, forbid_unknown_fields=True):
    """How the server behaves where releases and sites differ.

    ``expired_is_anonymous``: an expired token counts as none (before 5.2) instead of 401.
    ``merge_lifecycle``: PATCH .../datasetlifecycle exists (since 4.19).
    ``v3_only``: nothing below /api/v4.
    ``validate_jobs``: the site asks for archivable, retrievable or published datasets when a job is created.
    ``lifecycle_on_create``: what a new dataset without lifecycle gets: the server's defaults, or what the Ingestor
    sends for data that still have to be moved.
    ``datablock_by_id_broken``: GET /datablocks/{id} answers with any datablock (before 5.2).
    ``unstable_order``: lists without an order begin somewhere else with each request.
    ``job_action_urls``: told of every new job, with Basic authentication when a user is set.
    """

    token_lifetime_s: float = 3600.0
    expired_is_anonymous: bool = False
    merge_lifecycle: bool = True
    v3_only: bool = False
    validate_jobs: bool = False
    lifecycle_on_create: Literal["server", "ingestor"] = "server"
    datablock_by_id_broken: bool = False
    unstable_order: bool = False
    body_limit_bytes: int = BODY_LIMIT_BYTES
    job_types: list[str] = msgspec.field(default_factory=lambda: ["archive", "retrieve", "public"])
    job_action_urls: list[str] = msgspec.field(default_factory=list)
    job_action_user: str = ""
    job_action_password: str = ""
    job_action_timeout_s: float = 300.0


class Fault(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Something that goes wrong with the requests that match ``method`` and ``path``, ``times`` times.

    ``path`` is a regular expression, searched in the path as sent and with its escapes decoded. ``method``: "" is any.
    ``after``: so many matches pass unharmed first; ``times`` below 0 is for ever.
    ``handled``: the request takes effect before things go wrong; otherwise it never reaches the catalogue.
    What goes wrong, one or more: ``delay_s``; ``hold`` (the request waits until the fault is removed); ``close`` (the
    connection is closed without an answer); ``status`` with ``headers``, ``body`` and ``content_type``.
    """

    method: str = ""
    path: str = ""
    times: int = 1
    after: int = 0
    handled: bool = False
    delay_s: float = 0.0
    hold: bool = False
    close: bool = False
    status: int | None = None
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    body: str = ""
    content_type: str = "application/json; charset=utf-8"
    id: str = msgspec.field(default_factory=lambda: uuid.uuid4().hex[:12])
    hits: int = 0


class LoggedRequest(msgspec.Struct, frozen=True):
    """One request, as it was answered; ``status`` 0: the connection was closed without an answer."""

    at_s: float
    method: str
    path: str
    query: str
    status: int
    user: str


class Change(msgspec.Struct, frozen=True):
    """One change of a document.

    ``kind``: lifecycle (``id``: the dataset), job (the job), datablock (its archiveId). ``after`` holds the states that
    people see; ``sent`` are the names of the fields in the request.
    """

    at_s: float
    at: str
    kind: str
    id: str
    action: str
    user: str
    after: Document
    sent: list[str]


def new_id() -> str:
    return str(uuid.uuid4())


def utc(moment: datetime) -> str:
    """As the backend writes times: UTC with milliseconds. A time without a zone is local."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def now() -> str:
    return utc(datetime.now(UTC))


class State:
    """Everything in memory; replaced as a whole by a reset, so that late requests hit the old one."""

    def __init__(self, switches: Switches | None = None) -> None:
        self.switches = switches or Switches()
        self.accounts: dict[str, Account] = {}
        self.datasets: dict[str, Document] = {}
        self.orig_datablocks: dict[str, dict[str, Document]] = {}  # by dataset, then by id
        self.datablocks: dict[str, dict[str, Document]] = {}
        self.archive_ids: dict[str, str] = {}  # archiveId to the dataset's id: the unique index is global
        self.jobs: dict[str, Document] = {}
        self.faults: list[Fault] = []
        self.log: deque[LoggedRequest] = deque(maxlen=_LOG_LENGTH)
        self.history: deque[Change] = deque(maxlen=_LOG_LENGTH)
        self.started_at = now()
        self.token_key = secrets.token_hex(32)
        self.token_epoch = 0
        self.unordered_lists = 0
        self.remembered = 0  # how many changes the history ever had

    def remember(
        self, kind: str, document_id: str, action: str, user: str, after: Document, sent: list[str] | None = None
    ) -> None:
        self.remembered += 1
        self.history.append(Change(time.time(), now(), kind, document_id, action, user, after, sent or []))
