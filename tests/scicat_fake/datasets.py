"""Datasets: create, read, list, change, delete."""

from __future__ import annotations

from datetime import datetime
from email.utils import parsedate_to_datetime

from tests.scicat_fake import lifecycles
from tests.scicat_fake.access import has, may_change_dataset, may_create_blocks, may_read_blocks, may_read_dataset
from tests.scicat_fake.calls import Call, Reply, Route
from tests.scicat_fake.datasets_access import found, readable
from tests.scicat_fake.errors import forbidden, http_error, invalid
from tests.scicat_fake.queries import limits_of, parsed, projected, selected
from tests.scicat_fake.state import DELETE, Document, State, new_id, now
from tests.scicat_fake.validation import (
    ANY,
    BOOLEAN,
    DATE,
    INTEGER,
    NUMBER,
    OBJECT,
    STRING,
    STRINGS,
    TEXT,
    Field,
    check,
    required,
)

__all__ = ["ROUTES", "insert_dataset"]

PID_PREFIX = "20.500.11935"

_FIELDS: dict[str, Field] = {
    **dict.fromkeys(
        (
            *("owner", "ownerEmail", "orcidOfOwner", "sourceFolderHost", "validationStatus", "description"),
            *("classification", "license", "scientificMetadataSchema", "comment", "creationLocation", "dataFormat"),
            *("jobLogData", "runNumber", "instrumentGroup", "proposalId", "sampleId", "instrumentId"),
            *("principalInvestigator", "investigator", "datasetName"),
        ),
        STRING,
    ),
    **dict.fromkeys(
        (
            *("keywords", "sharedWith", "principalInvestigators", "proposalIds", "sampleIds", "instrumentIds"),
            *("inputDatasets", "usedSoftware", "accessGroups"),
        ),
        STRINGS,
    ),
    **dict.fromkeys(("size", "packedSize", "numberOfFiles", "numberOfFilesArchived"), INTEGER),
    **dict.fromkeys(("startTime", "endTime"), DATE),
    **dict.fromkeys(("isPublished", "scientificMetadataValid"), BOOLEAN),
    **dict.fromkeys(("techniques", "relationships", "datasetlifecycle"), ANY),
    **dict.fromkeys(("scientificMetadata", "jobParameters"), OBJECT),
    "dataQualityMetrics": NUMBER,
    "ownerGroup": STRING,
    "contactEmail": STRING,
    "sourceFolder": TEXT,
    "creationTime": DATE,
    "type": STRING,
}
_ALWAYS = ("ownerGroup", "contactEmail", "sourceFolder", "creationTime", "type")
_REQUIRED = {"v3": (*_ALWAYS, "owner"), "v4": (*_ALWAYS, "datasetName")}
_RAW_IN_V3 = ("creationLocation", "principalInvestigator")
_INGESTOR_SENDS: Document = {
    "archivable": False,
    "isOnCentralDisk": False,
    "archiveStatusMessage": "filesNotYetAvailable",
    "storageLocation": "ETHZ",
}


def insert_dataset(state: State, body: Document, username: str) -> Document:
    """Stores a new dataset without asking whether it is allowed."""
    pid = body.get("pid") or f"{PID_PREFIX}/{new_id()}"
    moment = now()
    lifecycle = dict(body.get("datasetlifecycle") or {})
    if not lifecycle and state.switches.lifecycle_on_create == "ingestor":
        lifecycle = dict(_INGESTOR_SENDS)
    dataset = {
        "_id": pid,
        "accessGroups": [],
        "isPublished": False,
        "size": 0,
        "numberOfFiles": 0,
        "keywords": [],
        **body,
        "pid": pid,
        "packedSize": body.get("packedSize") or 0,
        "numberOfFilesArchived": body.get("numberOfFilesArchived") or 0,
        "datasetlifecycle": lifecycles.replaced(state, lifecycle),
        "createdBy": username,
        "updatedBy": username,
        "createdAt": moment,
        "updatedAt": moment,
    }
    state.datasets[pid] = dataset
    return dataset


def _create(call: Call) -> Reply:
    account = call.known
    needed: tuple[str, ...] = _REQUIRED[call.version]
    if call.version == "v3" and isinstance(call.body, dict) and call.body.get("type") == "raw":
        needed = (*needed, *_RAW_IN_V3)
    fields = {**_FIELDS, "pid": STRING, **{name: required(_FIELDS[name]) for name in needed}}
    body = check(call.body, fields)
    if not may_create_blocks(account, body):
        raise http_error(403, "Unauthorized to create this dataset")
    if (pid := body.get("pid")) and pid in call.state.datasets:
        raise http_error(409, f"A dataset with pid {pid} already exists!")
    dataset = insert_dataset(call.state, body, account.username)
    lifecycles.remember(call, dataset, "create", body.get("datasetlifecycle") or {})
    return Reply(dataset, 201)


def _included(call: Call) -> list[str]:
    wanted = [*call.query.get("include", [])]
    of_filter = parsed(call.first("filter")).get("include") or []
    return wanted + [item["relation"] if isinstance(item, dict) else str(item) for item in of_filter]


def _read(call: Call) -> Reply:
    dataset = readable(call)
    include = _included(call)
    if not include:
        return Reply(dataset)
    known = {"origdatablocks": call.state.orig_datablocks, "datablocks": call.state.datablocks}
    if unknown := [name for name in include if name not in known]:
        raise http_error(400, f"Provided include field(s) is not allowed: {unknown}")
    answered = dict(dataset)
    for name in include:
        blocks = known[name].get(dataset["pid"], {}).values()
        answered[name] = [block for block in blocks if may_read_blocks(call.account, dataset)]
    return Reply(answered)


def _list(call: Call) -> Reply:
    wanted = parsed(call.first("filter"))
    visible = [item for item in list(call.state.datasets.values()) if may_read_dataset(call.account, item)]
    rows = selected(call.state, visible, wanted.get("where") or {}, limits_of(wanted.get("limits")))
    return Reply(projected(rows, wanted.get("fields")))


def _count(call: Call) -> Reply:
    where = parsed(call.first("where")) or parsed(call.first("filter")).get("where") or {}
    visible = [item for item in list(call.state.datasets.values()) if may_read_dataset(call.account, item)]
    return Reply({"count": len(selected(call.state, visible, where, limits_of(None, len(visible) + 1)))})


def _refuse_if_changed_since(call: Call, dataset: Document) -> None:
    since = call.headers.get("if-unmodified-since")
    if not since:
        return
    try:
        moment = parsedate_to_datetime(since)
    except ValueError:
        return
    if datetime.fromisoformat(dataset["updatedAt"]).replace(microsecond=0) > moment:
        raise http_error(412, "Update error due to failed if-modified-since condition")


def _patch(call: Call) -> Reply:
    account = call.known
    body = check(call.body, _FIELDS)
    dataset = found(call)
    if not may_change_dataset(account, dataset):
        raise forbidden()
    _refuse_if_changed_since(call, dataset)
    # Compared as a whole: with a charset behind it, the type is another one, and the lifecycle is replaced.
    merge = call.version == "v4" and call.headers.get("content-type") == "application/merge-patch+json"
    lifecycle = body.get("datasetlifecycle")
    if lifecycle is not None and not isinstance(lifecycle, dict):
        raise invalid(["datasetlifecycle must be an object"])
    for name, value in body.items():
        if name != "datasetlifecycle" and (value is not None or merge):
            dataset[name] = value
    if lifecycle is not None:
        current = dataset["datasetlifecycle"]
        state = call.state
        dataset["datasetlifecycle"] = (
            lifecycles.merged(state, current, lifecycle) if merge else lifecycles.replaced(state, lifecycle)
        )
        lifecycles.remember(call, dataset, "merge" if merge else "replace", lifecycle)
    lifecycles.changed(dataset, account.username)
    return Reply(dataset)


def _delete(call: Call) -> Reply:
    account = call.known
    dataset = found(call)
    if not has(account, DELETE):
        raise forbidden()
    del call.state.datasets[dataset["pid"]]
    return Reply(dataset)


ROUTES = (
    Route("POST", "datasets", _create),
    Route("GET", "datasets", _list),
    Route("GET", "datasets/count", _count),
    Route("GET", "datasets/:pid", _read),
    Route("PATCH", "datasets/:pid", _patch),
    Route("DELETE", "datasets/:pid", _delete),
    *lifecycles.ROUTES,
)
