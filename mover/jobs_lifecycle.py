"""What the catalogue shows for what became of a dataset and of a job, in SciCat's words.

They are chosen so that its frontend tells work in progress, success, the owner's error and the facility's error apart.
It reads a dataset's state from ``archivable``, ``retrievable`` and the two status messages: both false is
work in progress, ``missingFilesError`` with ``archivable`` the owner's error, ``scheduleArchiveJobFailed`` with both
false the facility's. A dataset that is archived already stays retrievable whatever becomes of a later job.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec

from mover.catalogue import Lifecycle
from mover.errors import ExitCode, Fault, MissingFilesError, MoverError

__all__ = [
    "FINISHED_UNSUCCESSFUL",
    "FINISHED_WITH_DATASET_ERRORS",
    "IN_PROGRESS",
    "SUBMITTED",
    "SUCCESSFUL",
    "DatasetOutcome",
    "JobKind",
    "OutcomeState",
    "failure_outcome",
    "is_archived",
    "is_finished",
    "is_started",
    "job_verdict",
    "outcome_lifecycle",
    "started_lifecycle",
    "told_failure",
]

JobKind = Literal["archive", "retrieve"]
OutcomeState = Literal["done", "user-error", "system-error", "cancelled"]

SUBMITTED: Final = "jobSubmitted"
IN_PROGRESS: Final = "inProgress"
SUCCESSFUL: Final = "finishedSuccessful"
FINISHED_WITH_DATASET_ERRORS: Final = "finishedWithDatasetErrors"
FINISHED_UNSUCCESSFUL: Final = "finishedUnsuccessful"

_SHOWN_FILES: Final = 1000  # paths in a message that the catalogue keeps; the others are counted
_VERBS: Final = {"archive": "archived", "retrieve": "retrieved"}


class DatasetOutcome(msgspec.Struct, frozen=True):
    """What became of one dataset of a job. ``message`` is for the scientist, ``details`` go into the catalogue."""

    dataset_id: str
    state: OutcomeState
    message: str
    details: dict[str, Any] = msgspec.field(default_factory=dict)


def is_finished(status_code: str) -> bool:
    """Whether a job has reached its end; its state is then never written over without somebody asking for it."""
    return status_code.startswith("finished")


def is_started(kind: JobKind, now: Lifecycle) -> bool:
    """Whether the dataset looks as if a job of this kind worked on it."""
    return (now.retrieve_status_message if kind == "retrieve" else now.archive_status_message) == "started"


def is_archived(now: Lifecycle) -> bool:
    """Whether the dataset is in the archive, whole."""
    return bool(now.retrievable)


def told_failure(dataset_id: str, now: Lifecycle) -> DatasetOutcome | None:
    """The owner's error that an archival has told before; None when there is none."""
    if now.archive_status_message != "missingFilesError" or not now.archivable:
        return None
    return DatasetOutcome(dataset_id, "user-error", str((now.archive_return_message or {}).get("message", "")))


def started_lifecycle(kind: JobKind, before: Lifecycle) -> Lifecycle:
    """The dataset's state while the job works on it."""
    if kind == "retrieve":
        return Lifecycle(
            retrieve_status_message="started", retrieve_return_message={}, retrieve_integrity_check=False
        )  # what an earlier retrieval proved says nothing of this one
    if is_archived(before):
        return Lifecycle(archive_return_message={})
    return Lifecycle(archivable=False, retrievable=False, archive_status_message="started", archive_return_message={})


def outcome_lifecycle(kind: JobKind, before: Lifecycle, outcome: DatasetOutcome) -> Lifecycle:
    """The dataset's state after the job. ``before``: as it was when the job began."""
    told = {"state": outcome.state, "message": outcome.message, **outcome.details}
    if kind == "retrieve":
        return _retrieved(outcome, told)
    if outcome.state == "done":
        return Lifecycle(
            archivable=False,
            retrievable=True,
            archive_status_message="datasetOnArchiveDisk",
            archive_return_message=told,
        )
    if is_archived(before):
        return Lifecycle(archive_return_message=told)
    message = {
        "user-error": "missingFilesError",
        "system-error": "scheduleArchiveJobFailed",
        "cancelled": "datasetCreated",
    }[outcome.state]
    return Lifecycle(
        archivable=outcome.state != "system-error",
        retrievable=False,
        archive_status_message=message,
        archive_return_message=told,
    )


def _retrieved(outcome: DatasetOutcome, told: dict[str, Any]) -> Lifecycle:
    if outcome.state == "done":
        return Lifecycle(
            retrieve_status_message="datasetRetrieved", retrieve_return_message=told, retrieve_integrity_check=True
        )
    message = {"user-error": "datasetRetrievalFailed", "system-error": "scheduleRetrieveJobFailed", "cancelled": ""}
    return Lifecycle(retrieve_status_message=message[outcome.state], retrieve_return_message=told)


def failure_outcome(dataset_id: str, error: MoverError) -> DatasetOutcome:
    """The outcome for an error: its own words for the owner's errors, and who has to act."""
    details: dict[str, Any] = {"retryable": error.retryable}
    if isinstance(error, MissingFilesError):
        details |= {"missingFiles": list(error.missing[:_SHOWN_FILES]), "missingFileCount": len(error.missing)}
        details |= {"wrongSizeFiles": list(error.wrong_size[:_SHOWN_FILES]), "wrongSizeCount": len(error.wrong_size)}
    if error.fault is Fault.USER and error.exit_code is not ExitCode.USAGE:
        return DatasetOutcome(dataset_id, "user-error", str(error), details)
    message = f"the archive system failed, the data is not at fault: {error}"
    return DatasetOutcome(dataset_id, "system-error", message, details)


def job_verdict(kind: JobKind, outcomes: Sequence[DatasetOutcome]) -> tuple[str, str]:
    """Status code and message of a finished job: the gravest outcome counts, every failure is named."""
    states = {outcome.state for outcome in outcomes}
    done = sum(outcome.state == "done" for outcome in outcomes)
    if states <= {"done"}:
        code = SUCCESSFUL
    elif states & {"system-error", "cancelled"}:
        code = FINISHED_UNSUCCESSFUL
    else:
        code = FINISHED_WITH_DATASET_ERRORS
    reasons = [f"{item.dataset_id}: {item.message}" for item in outcomes if item.state != "done"]
    return code, "; ".join([f"{done} of {len(outcomes)} dataset(s) {_VERBS[kind]}", *reasons])
