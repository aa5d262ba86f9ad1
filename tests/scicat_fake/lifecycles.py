"""The lifecycle of a dataset: its defaults, and its two ways to change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from tests.scicat_fake.access import may_patch_lifecycle
from tests.scicat_fake.calls import Call, Reply, Route
from tests.scicat_fake.datasets_access import found, readable
from tests.scicat_fake.errors import forbidden, http_error
from tests.scicat_fake.state import Document, State, now, utc
from tests.scicat_fake.validation import ANY, BOOLEAN, DATE, STRING, Field, check

__all__ = ["LIFECYCLE_FIELDS", "ROUTES", "changed", "defaults", "merged", "remember", "replaced"]

_ARCHIVE_RETENTION = timedelta(days=10 * 365)
_EMBARGO = timedelta(days=3 * 365)

LIFECYCLE_FIELDS: dict[str, Field] = {
    **dict.fromkeys(("archivable", "retrievable", "publishable", "isOnCentralDisk", "retrieveIntegrityCheck"), BOOLEAN),
    **dict.fromkeys(("dateOfDiskPurging", "archiveRetentionTime", "dateOfPublishing", "publishedOn"), DATE),
    **dict.fromkeys(("archiveStatusMessage", "retrieveStatusMessage"), STRING),
    **dict.fromkeys(("archiveReturnMessage", "retrieveReturnMessage", "storageLocation", "exportedTo"), ANY),
}
_SHOWN = ("archivable", "retrievable", "archiveStatusMessage", "retrieveStatusMessage", "retrieveIntegrityCheck")


def defaults(state: State) -> Document:
    """What the server fills in where nothing is said; two of the dates are the time of its start."""
    today = datetime.now(UTC)
    return {
        "archivable": True,
        "retrievable": False,
        "publishable": False,
        "dateOfDiskPurging": state.started_at,
        "archiveRetentionTime": utc(today + _ARCHIVE_RETENTION),
        "dateOfPublishing": utc(today + _EMBARGO),
        "publishedOn": state.started_at,
        "isOnCentralDisk": True,
        "archiveStatusMessage": "datasetCreated",
        "retrieveStatusMessage": "",
        "archiveReturnMessage": {},
        "retrieveReturnMessage": {},
        "retrieveIntegrityCheck": False,
    }


def replaced(state: State, sent: Document) -> Document:
    """The sub-object as a dataset's PATCH leaves it: what was sent and defaults; nothing of the earlier one stays.

    It is not validated on this way: unknown keys vanish, booleans may be words.
    """
    known = {key: _cast(key, value) for key, value in sent.items() if key in LIFECYCLE_FIELDS and value is not None}
    return {**defaults(state), **known}


def merged(state: State, current: Document, sent: Document) -> Document:
    """As a merge-patch does it: null resets a field to its default."""
    fresh = defaults(state)
    kept = {**current, **{key: _cast(key, value) for key, value in sent.items() if key in LIFECYCLE_FIELDS}}
    return {key: fresh.get(key) if value is None else value for key, value in kept.items()}


def _cast(key: str, value: Any) -> Any:  # noqa: ANN401 - any JSON
    if LIFECYCLE_FIELDS[key] is BOOLEAN and value in {"true", "false"}:
        return value == "true"
    if LIFECYCLE_FIELDS[key] is DATE and isinstance(value, str):
        return utc(datetime.fromisoformat(value))
    return value


def changed(dataset: Document, username: str) -> None:
    dataset["updatedAt"], dataset["updatedBy"] = now(), username


def remember(call: Call, dataset: Document, action: str, sent: Document) -> None:
    after = {name: dataset["datasetlifecycle"].get(name) for name in _SHOWN}
    call.state.remember("lifecycle", dataset["pid"], action, call.username, after, sorted(sent))


def _read(call: Call) -> Reply:
    return Reply(readable(call)["datasetlifecycle"])


def _patch(call: Call) -> Reply:
    if not call.state.switches.merge_lifecycle:
        raise http_error(404, f"Cannot PATCH /api/{call.version}/datasets/{call.params['pid']}/datasetlifecycle")
    account = call.known
    sent = check(call.body, LIFECYCLE_FIELDS)
    if not sent:
        raise http_error(400, "No lifecycle fields were given")
    dataset = found(call)
    if not may_patch_lifecycle(account, dataset):
        raise forbidden()
    is_merge_patch = call.headers.get("content-type") == "application/merge-patch+json"
    kept = sent if is_merge_patch else {key: value for key, value in sent.items() if value is not None}
    dataset["datasetlifecycle"] = merged(call.state, dataset["datasetlifecycle"], kept)
    changed(dataset, account.username)
    remember(call, dataset, "merge", sent)
    return Reply(dataset["datasetlifecycle"])


ROUTES = (
    Route("GET", "datasets/:pid/datasetlifecycle", _read),
    Route("PATCH", "datasets/:pid/datasetlifecycle", _patch),
)
