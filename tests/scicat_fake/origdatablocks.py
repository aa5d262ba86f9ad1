"""Origdatablocks: the files of a dataset as they were ingested."""

from __future__ import annotations

from tests.scicat_fake.access import may_create_blocks, may_read_blocks
from tests.scicat_fake.calls import Call, Reply, Route
from tests.scicat_fake.datasets_access import found
from tests.scicat_fake.errors import forbidden, http_error
from tests.scicat_fake.queries import LIST_CAP, check_filter_keys, limits_of, parsed, projected, selected
from tests.scicat_fake.state import Document, State, new_id, now
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

__all__ = ["ROUTES", "insert_origdatablock", "visible_blocks"]

_ROWS_IN_V4 = 10
_FIELDS: dict[str, Field] = {"size": required(INTEGER), "dataFileList": ANY, "chkAlg": TEXT}
_FLAT_FIELDS: dict[str, Field] = {
    **_FIELDS,
    "datasetId": required(STRING),
    "ownerGroup": STRING,
    "accessGroups": STRINGS,
    "instrumentGroup": STRING,
    "isPublished": BOOLEAN,
}
_FILTER_FIELDS = frozenset(
    (
        *("_id", "id", "datasetId", "size", "chkAlg", "dataFileList", "ownerGroup", "accessGroups", "instrumentGroup"),
        *("isPublished", "createdBy", "updatedBy", "createdAt", "updatedAt", "path", "time", "chk", "uid", "gid"),
        *("perm", "type"),
    )
)


def insert_origdatablock(state: State, dataset: Document, body: Document, username: str) -> Document:
    """Stores a block and adds it to the dataset's sums, without asking whether it is allowed."""
    moment, block_id = now(), new_id()
    block = {
        "_id": block_id,
        "id": block_id,
        "datasetId": dataset["pid"],
        "size": body["size"],
        "dataFileList": stored_files(body["dataFileList"]),
        "ownerGroup": dataset.get("ownerGroup"),
        "accessGroups": dataset.get("accessGroups") or [],
        "isPublished": bool(dataset.get("isPublished")),
        "createdBy": username,
        "updatedBy": username,
        "createdAt": moment,
        "updatedAt": moment,
    }
    if body.get("chkAlg"):
        block["chkAlg"] = body["chkAlg"]
    state.orig_datablocks.setdefault(dataset["pid"], {})[block_id] = block
    dataset["size"] = (dataset.get("size") or 0) + body["size"]
    dataset["numberOfFiles"] = (dataset.get("numberOfFiles") or 0) + len(body["dataFileList"])
    return block


def _create(call: Call) -> Reply:
    account = call.known
    nested = "pid" in call.params
    fields = _FIELDS if nested else _FLAT_FIELDS
    body = check(call.body, fields, more=files_checked(call.body, empty_allowed=True))
    dataset = found(call, None if nested else body["datasetId"])
    if not may_create_blocks(account, dataset):
        raise forbidden()
    return Reply(insert_origdatablock(call.state, dataset, body, account.username), 201)


def visible_blocks(call: Call, blocks: dict[str, dict[str, Document]], where: Document) -> list[Document]:
    """All blocks that the account may read; the others are left out without a word."""
    wanted = where.get("datasetId")
    of_datasets = [blocks.get(wanted, {})] if isinstance(wanted, str) else list(blocks.values())
    return [block for each in of_datasets for block in list(each.values()) if _visible(call, block)]


def _visible(call: Call, block: Document) -> bool:
    return may_read_blocks(call.account, call.state.datasets.get(block["datasetId"]) or block)


def _list(call: Call) -> Reply:
    wanted = parsed(call.first("filter"))
    if call.version == "v4":
        check_filter_keys(wanted, _FILTER_FIELDS)
    where = wanted.get("where") or {}
    limits = limits_of(wanted.get("limits"), _ROWS_IN_V4 if call.version == "v4" else LIST_CAP)
    rows = selected(call.state, visible_blocks(call, call.state.orig_datablocks, where), where, limits)
    return Reply(projected(rows, wanted.get("fields")))


def _one(call: Call) -> Reply:
    for blocks in list(call.state.orig_datablocks.values()):
        if block := blocks.get(call.params["id"]):
            if not _visible(call, block):
                raise forbidden()
            return Reply(block)
    raise http_error(404, f"OrigDatablock: {call.params['id']} not found")


def _of_dataset(call: Call) -> list[Document]:
    dataset = found(call)
    if not may_read_blocks(call.account, dataset):
        raise forbidden()
    return list(call.state.orig_datablocks.get(dataset["pid"], {}).values())


def _nested(call: Call) -> Reply:
    return Reply(_of_dataset(call)[:LIST_CAP])


def _count(call: Call) -> Reply:
    return Reply({"count": len(_of_dataset(call))})


ROUTES = (
    Route("POST", "origdatablocks", _create),
    Route("GET", "origdatablocks", _list),
    Route("GET", "origdatablocks/:id", _one),
    Route("POST", "datasets/:pid/origdatablocks", _create, ("v3",)),
    Route("GET", "datasets/:pid/origdatablocks", _nested, ("v3",)),
    Route("GET", "datasets/:pid/origdatablocks/count", _count, ("v3",)),
)
