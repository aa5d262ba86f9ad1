"""Jobs: two spellings of the same document, and what happens when one is created."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

import msgspec

from tests.scicat_fake.access import has, may_change_jobs, may_read_dataset, may_read_job
from tests.scicat_fake.calls import Call, Reply, Route
from tests.scicat_fake.errors import http_error, internal_error, job_error
from tests.scicat_fake.queries import LIST_CAP, check_filter_keys, limits_of, parsed, projected, selected
from tests.scicat_fake.state import ADMIN, CREATE_JOB, Account, Document, State, new_id, now
from tests.scicat_fake.validation import ANY, OBJECT, STRING, Field, check, required

__all__ = ["ROUTES", "insert_job"]

_V3, _V4 = ("v3",), ("v4",)
_CREATE_V4: dict[str, Field] = {
    "type": required(STRING),
    "jobParams": required(OBJECT),
    "ownerUser": STRING,
    "ownerGroup": STRING,
    "contactEmail": STRING,
}
_PATCH_V4: dict[str, Field] = {
    "statusCode": required(STRING),
    "statusMessage": required(STRING),
    "jobResultObject": OBJECT,
}
_CREATE_V3: dict[str, Field] = {
    "type": required(STRING),
    "datasetList": required(ANY),
    "emailJobInitiator": STRING,
    "jobParams": OBJECT,
    "jobStatusMessage": STRING,
}
_PATCH_V3: dict[str, Field] = {"jobStatusMessage": STRING, "jobResultObject": OBJECT, "executionTime": STRING}
_FILTER_FIELDS = frozenset(
    (
        *("_id", "id", "type", "ownerUser", "ownerGroup", "accessGroups", "contactEmail", "statusCode"),
        *("statusMessage", "jobParams", "jobResultObject", "configVersion", "createdBy", "createdAt", "updatedBy"),
        *("updatedAt", "isPublished", "datasetList", "pid", "files", "username"),
    )
)
_NAMES_IN_V3 = {"jobStatusMessage": "statusCode", "emailJobInitiator": "contactEmail", "creationTime": "createdAt"}
# What a site may ask of the datasets of a job: the field, its value, and the word for it.
_PRECONDITIONS = {"archive": "archivable", "retrieve": "retrievable"}


def insert_job(state: State, body: Document, username: str) -> Document:
    """Stores a new job without asking whether it is allowed; ``body`` as a v4 request has it."""
    moment, job_id = now(), new_id()
    job = {
        "_id": job_id,
        "id": job_id,
        "ownerUser": username,
        "ownerGroup": None,
        "accessGroups": [],
        "contactEmail": "",
        "statusCode": "jobSubmitted",
        "statusMessage": "Job submitted.",
        "jobResultObject": {},
        **body,
        "configVersion": "v1.0",
        "isPublished": False,
        "createdBy": username,
        "updatedBy": username,
        "createdAt": moment,
        "updatedAt": moment,
        "__v": 0,
    }
    state.jobs[job_id] = job
    _remember(state, job, "create", username)
    return job


def _remember(state: State, job: Document, action: str, username: str) -> None:
    after = {"statusCode": job["statusCode"], "statusMessage": job["statusMessage"], "type": job["type"]}
    state.remember("job", job["id"], action, username, after)


def _as_v3(job: Document) -> Document:
    params = {name: value for name, value in job["jobParams"].items() if name not in {"datasetList", "executionTime"}}
    view = {
        "_id": job["_id"],
        "id": job["id"],
        "emailJobInitiator": job["contactEmail"],
        "type": job["type"],
        "creationTime": job["createdAt"],
        "jobParams": params,
        "jobStatusMessage": job["statusCode"],
        "datasetList": job["jobParams"].get("datasetList", []),
        "jobResultObject": job["jobResultObject"],
    }
    if "executionTime" in job["jobParams"]:
        view["executionTime"] = job["jobParams"]["executionTime"]
    return view


def _view(call: Call, job: Document) -> Document:
    return _as_v3(job) if call.version == "v3" else job


# ------------------------------------------------------------------------------------------------------------ create
def _dataset_list(state: State, params: Document) -> list[Document]:
    datasets = params["datasetList"]
    if not isinstance(datasets, list):
        raise job_error(422, "Invalid dataset list")
    if not datasets:
        raise job_error(422, "List of passed datasets is empty.")
    if any(not isinstance(item, dict) or item.keys() != {"pid", "files"} for item in datasets):
        raise job_error(422, "Dataset list is expected to contain sets of pid and files.")
    if any(not isinstance(item["pid"], str) for item in datasets):
        raise job_error(422, "In datasetList each 'pid' field should be a string.")
    if any(not isinstance(item["files"], list) for item in datasets):
        raise job_error(422, "In datasetList each 'files' field should be an array.")
    # The look-up of the datasets is a list like any other: what is behind its end does not exist.
    wanted = {item["pid"] for item in datasets}
    seen = set([pid for pid in state.datasets if pid in wanted][:LIST_CAP])
    if missing := [item["pid"] for item in datasets if item["pid"] not in seen]:
        raise job_error(422, f"Datasets with pid {','.join(missing)} do not exist.")
    if problems := list(_missing_files(state, datasets)):
        raise job_error(422, "At least one requested file could not be found.", msgspec.json.encode(problems).decode())
    return datasets


def _missing_files(state: State, datasets: list[Document]) -> Iterator[Document]:
    for item in datasets:
        if item["files"]:
            blocks = list(state.orig_datablocks.get(item["pid"], {}).values())
            paths = {entry["path"] for block in blocks for entry in block["dataFileList"]}
            if missing := [path for path in item["files"] if path not in paths]:
                yield {"pid": item["pid"], "nonExistFiles": missing}


def _authorise(state: State, account: Account, body: Document, datasets: list[Document]) -> None:
    for_others = has(account, ADMIN, CREATE_JOB)
    if not for_others and not body.get("ownerGroup"):
        raise job_error(400, "Invalid new job. Owner group should be specified.")
    if not for_others and body["ownerGroup"] not in account.groups:
        raise job_error(400, "Invalid new job. User needs to belong to job owner group.")
    pids = {item["pid"] for item in datasets}
    seen = [pid for pid in pids if for_others or may_read_dataset(account, state.datasets[pid])]
    if len(seen) != len(datasets):  # the same dataset twice counts as one that is not accessible
        raise http_error(403, "Unauthorized to create this job.")


def _validate_for_the_site(state: State, body: Document, datasets: list[Document]) -> None:
    flag = _PRECONDITIONS.get(body["type"])
    for item in datasets:
        dataset = state.datasets[item["pid"]]
        fits = dataset["datasetlifecycle"].get(flag) is True if flag else True
        if body["type"] == "public":
            flag, fits = "isPublished", dataset.get("isPublished") is True
        if not fits:
            raise job_error(400, f"Job type {body['type']}: dataset {item['pid']} is not {flag}.")


def _body_of_v3(call: Call) -> Document:
    sent = {key: value for key, value in call.body.items() if key in _CREATE_V3} if isinstance(call.body, dict) else {}
    body = check(sent, _CREATE_V3)
    params = {**(body.get("jobParams") or {}), "datasetList": body["datasetList"]}
    converted: Document = {"type": body["type"], "jobParams": params}
    if body.get("emailJobInitiator"):
        converted["contactEmail"] = body["emailJobInitiator"]
    if body.get("jobStatusMessage"):
        converted["statusCode"] = converted["statusMessage"] = body["jobStatusMessage"]
    if params.get("ownerGroup"):
        converted["ownerGroup"] = params["ownerGroup"]
    return converted


async def _create(call: Call) -> Reply:
    account = call.known
    body = _body_of_v3(call) if call.version == "v3" else check(call.body, _CREATE_V4)
    body = {name: value for name, value in body.items() if value is not None}
    state = call.state
    if body["type"] not in state.switches.job_types:
        raise job_error(400, f"Invalid job type: {body['type']}")
    datasets = _dataset_list(state, body["jobParams"]) if "datasetList" in body["jobParams"] else []
    _authorise(state, account, body, datasets)
    if state.switches.validate_jobs:
        _validate_for_the_site(state, body, datasets)
    job = insert_job(state, {"contactEmail": account.email, **body}, account.username)
    await call.saved()
    for url in state.switches.job_action_urls:
        await asyncio.to_thread(_tell, state, url, job)
    return Reply(_view(call, job), 201)


def _tell(state: State, url: str, job: Document) -> None:
    """Runs the url action; its failure is the caller's, although the job is stored."""
    switches = state.switches
    body = msgspec.json.encode({"id": job["id"], "type": job["type"]})
    request = Request(url, data=body, method="POST", headers={"Content-Type": "text/plain;charset=UTF-8"})  # noqa: S310
    if switches.job_action_user:
        pair = f"{switches.job_action_user}:{switches.job_action_password}".encode()
        request.add_header("Authorization", f"Basic {base64.b64encode(pair).decode()}")
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=switches.job_action_timeout_s) as answer:
            answer.read()
    except HTTPError as error:
        said = error.read().decode(errors="replace")
        error.close()
        raise job_error(error.code, f"Got response: {said}") from None
    except (URLError, HTTPException, OSError):
        raise internal_error() from None


# -------------------------------------------------------------------------------------------------------------- read
def _found(call: Call) -> Document:
    account = call.known
    job = call.state.jobs.get(call.params["id"])
    if job is None or not may_read_job(account, job):
        raise job_error(400, "Invalid job id.")
    return job


def _datasets_of(call: Call, job: Document) -> list[Document]:
    pids = [item["pid"] for item in job["jobParams"].get("datasetList", [])]
    known = [call.state.datasets[pid] for pid in pids if pid in call.state.datasets]
    return [dataset for dataset in known if may_read_dataset(call.account, dataset)]


def _read(call: Call) -> Reply:
    job = _found(call)
    if call.version == "v3":
        return Reply(_as_v3(job))
    wanted = parsed(call.first("filter"))
    check_filter_keys(wanted, _FILTER_FIELDS)
    answered = dict(projected([job], wanted.get("fields"))[0])
    if "datasets" in (wanted.get("include") or []):
        answered["datasets"] = _datasets_of(call, job)
    return Reply(answered)


def _visible(call: Call) -> list[Document]:
    account = call.known
    return [job for job in list(call.state.jobs.values()) if may_read_job(account, job)]


def _list_v4(call: Call) -> Reply:
    visible = _visible(call)
    wanted = parsed(call.first("filter"))
    check_filter_keys(wanted, _FILTER_FIELDS)
    limits = limits_of(wanted.get("limits"))
    if not limits.order:
        visible.sort(key=lambda job: str(job["createdAt"]))
        limits = msgspec.structs.replace(limits, order=(("createdAt", False),))
    rows = selected(call.state, visible, wanted.get("where") or {}, limits, limit_first=True)
    return Reply(projected(rows, wanted.get("fields")))


def _list_v3(call: Call) -> Reply:
    visible = _visible(call)
    wanted = parsed(call.first("filter"))
    if unknown := wanted.keys() - {"limits", "fields", "include"}:
        raise http_error(400, f"Property {min(unknown)} should not exist in the filter object")
    rows = selected(call.state, visible, {}, limits_of(wanted.get("limits")))
    return Reply([_as_v3(job) for job in rows])


def _fullquery(call: Call) -> Reply:
    visible = _visible(call)
    fields = parsed(call.first("fields"))
    fields = {**fields.pop("mode", {}), **fields}
    where = {_NAMES_IN_V3.get(name, name): value for name, value in fields.items()}
    where = {name: {"$in": value} if isinstance(value, list) else value for name, value in where.items()}
    rows = selected(call.state, visible, where, limits_of(parsed(call.first("limits"))))
    return Reply([_view(call, job) for job in rows])


def _dataset_details(call: Call) -> Reply:
    call.params = {"id": call.first("jobId") or ""}
    return Reply(_datasets_of(call, _found(call)))


# ------------------------------------------------------------------------------------------------------------- patch
def _patch(call: Call) -> Reply:
    account = call.known
    if call.version == "v3":
        known = call.body.items() if isinstance(call.body, dict) else ()
        change = _change_of_v3(check({key: value for key, value in known if key in _PATCH_V3}, _PATCH_V3))
    else:
        change = dict(check(call.body, _PATCH_V4))
    job = _found(call)
    if not may_change_jobs(account):
        raise http_error(403, "Unauthorized to update this job.")
    for item in job["jobParams"].get("datasetList", []):
        if item["pid"] not in call.state.datasets:
            raise http_error(404, "Unable to get a dataset")
    result = change.get("jobResultObject")
    moved = change.pop("executionTime", None)
    if isinstance(result, dict) and "executionTime" in result:
        change["jobResultObject"] = {name: value for name, value in result.items() if name != "executionTime"}
        moved = result["executionTime"]
    if moved is not None:
        job["jobParams"] = {**job["jobParams"], "executionTime": moved}
    job.update(change)  # jobResultObject as a whole; null is stored as null
    job["updatedAt"], job["updatedBy"] = now(), account.username
    _remember(call.state, job, "patch", account.username)
    return Reply(_view(call, job))


def _change_of_v3(body: Document) -> Document:
    change: Document = {name: body[name] for name in ("jobResultObject", "executionTime") if name in body}
    if body.get("jobStatusMessage") is not None:
        change["statusCode"] = change["statusMessage"] = body["jobStatusMessage"]
    return change


ROUTES = (
    Route("POST", "jobs", _create),
    Route("GET", "jobs", _list_v3, _V3),
    Route("GET", "jobs", _list_v4, _V4),
    Route("GET", "jobs/fullquery", _fullquery),
    Route("GET", "jobs/datasetDetails", _dataset_details, _V3),
    Route("GET", "jobs/:id", _read),
    Route("PATCH", "jobs/:id", _patch),
)
