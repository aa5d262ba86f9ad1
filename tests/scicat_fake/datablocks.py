"""Datablocks: what the archive says that it holds. They exist in v3 only."""

from __future__ import annotations

from tests.scicat_fake.access import has, may_create_blocks, may_read_blocks
from tests.scicat_fake.calls import Call, Reply, Route
from tests.scicat_fake.datasets_access import found
from tests.scicat_fake.errors import forbidden, http_error, internal_error
from tests.scicat_fake.origdatablocks import visible_blocks
from tests.scicat_fake.queries import LIST_CAP, limits_of, parsed, projected, selected
from tests.scicat_fake.state import DELETE, Document, State, new_id, now
from tests.scicat_fake.validation import (
    ANY,
    BOOLEAN,
    INTEGER,
    STRING,
    STRINGS,
    TEXT,
    Field,
    check,
    files_checked,
    required,
    stored_files,
)

__all__ = ["ROUTES", "insert_datablock"]

_V3 = ("v3",)
_FIELDS: dict[str, Field] = {
    "archiveId": required(STRING),
    "size": required(INTEGER),
    "packedSize": required(INTEGER),
    "version": required(STRING),
    "chkAlg": TEXT,
    "dataFileList": ANY,
}
_FLAT_FIELDS: dict[str, Field] = {
    **_FIELDS,
    "datasetId": required(STRING),
    "ownerGroup": STRING,
    "accessGroups": STRINGS,
    "instrumentGroup": STRING,
    "isPublished": BOOLEAN,
}


def insert_datablock(state: State, dataset: Document, body: Document, username: str) -> Document:
    """Stores a datablock and adds it to the dataset's sums, without asking whether it is allowed."""
    moment, block_id = now(), new_id()
    block = {
        "_id": block_id,
        "id": block_id,
        **{name: body[name] for name in _FIELDS if body.get(name) is not None},
        "dataFileList": stored_files(body["dataFileList"]),
        "datasetId": dataset["pid"],
        "ownerGroup": dataset.get("ownerGroup"),
        "accessGroups": dataset.get("accessGroups") or [],
        "isPublished": bool(dataset.get("isPublished")),
        "createdBy": username,
        "updatedBy": username,
        "createdAt": moment,
        "updatedAt": moment,
    }
    state.datablocks.setdefault(dataset["pid"], {})[block_id] = block
    state.archive_ids[block["archiveId"]] = dataset["pid"]
    _count_in(dataset, block, 1)
    _remember(state, block, "create", username)
    return block


def _count_in(dataset: Document, block: Document, sign: int) -> None:
    dataset["packedSize"] = (dataset.get("packedSize") or 0) + sign * block["packedSize"]
    files = len(block["dataFileList"])
    dataset["numberOfFilesArchived"] = (dataset.get("numberOfFilesArchived") or 0) + sign * files


def _remember(state: State, block: Document, action: str, username: str) -> None:
    after = {"datasetId": block["datasetId"], "packedSize": block["packedSize"]}
    state.remember("datablock", block["archiveId"], action, username, after)


def _create(call: Call) -> Reply:
    account = call.known
    nested = "pid" in call.params
    fields = _FIELDS if nested else _FLAT_FIELDS
    body = check(call.body, fields, more=files_checked(call.body, empty_allowed=False))
    dataset = found(call, None if nested else body["datasetId"])
    if not may_create_blocks(account, dataset):
        raise forbidden()
    if body["archiveId"] in call.state.archive_ids:
        raise internal_error() if nested else http_error(409, "Datablock with the same archiveId already exists")
    return Reply(insert_datablock(call.state, dataset, body, account.username), 201)


def _list(call: Call) -> Reply:
    wanted = parsed(call.first("filter"))
    where = wanted.get("where") or {}
    rows = visible_blocks(call, call.state.datablocks, where)
    return Reply(projected(selected(call.state, rows, where, limits_of(wanted.get("limits"))), wanted.get("fields")))


def _one(call: Call) -> Reply:
    for block in visible_blocks(call, call.state.datablocks, {}):
        if call.state.switches.datablock_by_id_broken or block["_id"] == call.params["id"]:
            return Reply(block)
    raise http_error(404, f"Datablock: {call.params['id']} not found")


def _of_dataset(call: Call) -> list[Document]:
    dataset = found(call)
    if not may_read_blocks(call.account, dataset):
        raise forbidden()
    return list(call.state.datablocks.get(dataset["pid"], {}).values())


def _nested(call: Call) -> Reply:
    return Reply(_of_dataset(call)[:LIST_CAP])


def _count(call: Call) -> Reply:
    return Reply({"count": len(_of_dataset(call))})


def _removed(call: Call, dataset: Document, block: Document) -> None:
    del call.state.datablocks[dataset["pid"]][block["_id"]]
    call.state.archive_ids.pop(block["archiveId"], None)
    _remember(call.state, block, "delete", call.username)


def _for_deletion(call: Call) -> Document:
    account = call.known
    dataset = found(call)
    if not has(account, DELETE):
        raise forbidden()
    return dataset


def _delete(call: Call) -> Reply:
    dataset = _for_deletion(call)
    block = call.state.datablocks.get(dataset["pid"], {}).get(call.params["id"])
    if block is None:
        raise http_error(404, f"Datablock: {call.params['id']} not found")
    _removed(call, dataset, block)
    _count_in(dataset, block, -1)
    return Reply()


def _delete_all(call: Call) -> Reply:
    dataset = _for_deletion(call)
    blocks = list(call.state.datablocks.get(dataset["pid"], {}).values())
    for block in blocks:
        _removed(call, dataset, block)
    dataset["packedSize"] = dataset["numberOfFilesArchived"] = 0
    return Reply({"count": len(blocks)})


ROUTES = (
    Route("POST", "datablocks", _create, _V3),
    Route("GET", "datablocks", _list, _V3),
    Route("GET", "datablocks/:id", _one, _V3),
    Route("POST", "datasets/:pid/datablocks", _create, _V3),
    Route("GET", "datasets/:pid/datablocks", _nested, _V3),
    Route("GET", "datasets/:pid/datablocks/count", _count, _V3),
    Route("DELETE", "datasets/:pid/datablocks", _delete_all, _V3),
    Route("DELETE", "datasets/:pid/datablocks/:id", _delete, _V3),
)
