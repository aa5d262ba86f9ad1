"""The routes of jobs and limits: a request in, a call of the service, its answer out."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, TypeVar

import msgspec
from litestar import Request, Response, delete, get, patch, post
from litestar.exceptions import HTTPException
from litestar.openapi import ResponseSpec
from litestar.params import Dependency, Parameter

from mover.api import DatasetView, JobOrder, JobPage, JobState, JobView, LimitsChange, LimitsView
from mover.daemon_http_access import Caller
from mover.daemon_http_bodies import BodyError, check_order, decode_body, field_error
from mover.daemon_http_streams import EventStream, Streams
from mover.daemon_jobs import JobService

__all__ = ["JOB_ROUTES", "body_of", "caller_of", "idempotency_key", "json_response"]

T = TypeVar("T")

_JSON: Final = "application/json"
_KEY: Final = re.compile(r"[\x21-\x7e]{1,255}")
_KEY_FORM: Final = "1 to 255 printable ASCII characters without blanks"
_NUMBER: Final = re.compile(r"[0-9]{1,15}")

_Service = Annotated[JobService, Dependency(skip_validation=True)]
_Streams = Annotated[Streams, Dependency(skip_validation=True)]
_Ask = Request[Any, Any, Any]
_JobId = Annotated[str, Parameter(description="the job's id")]
_DatasetId = Annotated[str, Parameter(min_length=1, max_length=1024, description="PID of a dataset, with its slash")]
_Key = Annotated[
    str | None,
    Parameter(
        header="Idempotency-Key",
        description=f"the caller's own key of the order, {_KEY_FORM}: sent again with it, the order is the same job",
    ),
]
_LastEventId = Annotated[
    str | None, Parameter(header="Last-Event-ID", description="number of the last event that was received")
]
_After = Annotated[
    int | None, Parameter(ge=0, le=10**15 - 1, description="the same, for those who cannot send headers")
]


def caller_of(request: _Ask) -> Caller:
    """Who asks, as the front door found out."""
    caller: Caller = request.scope["state"]["caller"]
    return caller


async def body_of(request: _Ask, kind: type[T]) -> T:
    """The body, which has to be JSON.  Raises BodyError, HTTPException."""
    declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if declared != _JSON:
        raise HTTPException(status_code=415, detail=f"the body is {declared or 'of no type'}, and has to be {_JSON}")
    return decode_body(await request.body(), kind)


def json_response(value: object, status_code: int = 200, headers: dict[str, str] | None = None) -> Response[bytes]:
    """An answer in JSON."""
    return Response(msgspec.json.encode(value), status_code=status_code, headers=headers, media_type=_JSON)


def idempotency_key(given: str | None) -> str:
    """The key; with quotation marks around it, as structured headers have them, or without.  Raises BodyError."""
    if given is None:
        return ""
    key = given[1:-1] if len(given) > 1 and given[0] == given[-1] == '"' else given
    if not _KEY.fullmatch(key):
        detail = f"the header Idempotency-Key: allowed are {_KEY_FORM}"
        raise BodyError(detail, (field_error("Idempotency-Key", given, _KEY_FORM),))
    return key


@post(
    "/v1/jobs",
    operation_id="submitJob",
    tags=["jobs"],
    summary="Order a job",
    description="Accepted is what has been made durable. The answer does not wait for the work.",
    status_code=202,
    responses={200: ResponseSpec(JobView, description="the job that the key had ordered before")},
)
async def _submit(request: _Ask, service: _Service, idempotency_key_: _Key = None) -> Response[bytes]:
    order = await body_of(request, JobOrder)
    check_order(order)
    key = idempotency_key(idempotency_key_)
    job, new = await service.submit(order, owner=caller_of(request).name, key=key)
    return json_response(job, 202 if new else 200, {"Location": f"/v1/jobs/{job.id}"})


@get("/v1/jobs", operation_id="listJobs", tags=["jobs"], summary="Jobs, newest first, without changes and reports")
async def _list(
    service: _Service,
    state_: Annotated[JobState | None, Parameter(query="state")] = None,
    owner: str | None = None,
    dataset_id: _DatasetId | None = None,
    before: Annotated[str, Parameter(description="`next` of the page before")] = "",
    limit: Annotated[int, Parameter(ge=1, le=1000)] = 100,
) -> Response[bytes]:
    page: JobPage = await service.jobs(state=state_, owner=owner, dataset_id=dataset_id, before=before, limit=limit)
    return json_response(page)


@get("/v1/jobs/{job_id:str}", operation_id="getJob", tags=["jobs"], summary="One job, with its changes and reports")
async def _one(service: _Service, job_id: _JobId) -> Response[bytes]:
    return json_response(await service.job(job_id))


@get(
    "/v1/jobs/{job_id:str}/dataset",
    operation_id="getDataset",
    tags=["jobs"],
    summary="One dataset of a job, with its report however long it is",
)
async def _dataset(service: _Service, job_id: _JobId, dataset_id: _DatasetId) -> Response[bytes]:
    found: DatasetView = await service.dataset(job_id, dataset_id)
    return json_response(found)


@delete(
    "/v1/jobs/{job_id:str}",
    operation_id="cancelJob",
    tags=["jobs"],
    summary="Cancel a job",
    description="Work stops where it can be taken up again. A job that has ended stays as it is.",
    status_code=200,
)
async def _cancel(request: _Ask, service: _Service, job_id: _JobId) -> Response[bytes]:
    return json_response(await service.cancel(job_id, who=caller_of(request).name))


@get(
    "/v1/jobs/{job_id:str}/events",
    operation_id="followJob",
    tags=["events"],
    summary="A job's events, to its end",
    description=(
        "Server-sent events: the changes that are kept, then live ones; the data of each is a JobEvent. The stream ends"
        " after the event `end`. One that broke goes on where `Last-Event-ID` says."
    ),
)
async def _follow(
    service: _Service, streams: _Streams, job_id: _JobId, last_event_id: _LastEventId = None, after: _After = None
) -> EventStream:
    return EventStream(service.events(job_id, _number(last_event_id, after)), streams)


@get(
    "/v1/events",
    operation_id="followAll",
    tags=["events"],
    summary="Events of all jobs, from now on",
    description="Server-sent events without an end; the data of each is a JobEvent.",
)
async def _follow_all(
    service: _Service, streams: _Streams, last_event_id: _LastEventId = None, after: _After = None
) -> EventStream:
    return EventStream(service.all_events(_number(last_event_id, after)), streams)


def _number(last_event_id: str | None, after: int | None) -> int:
    if not last_event_id:  # browsers have none at first
        return after or 0
    if not _NUMBER.fullmatch(last_event_id):
        detail = "the header Last-Event-ID: allowed is the number of an event"
        raise BodyError(detail, (field_error("Last-Event-ID", last_event_id, "the number of an event"),))
    return int(last_event_id)


@get("/v1/limits", operation_id="getLimits", tags=["limits"], summary="The limits: slots, who holds one, who waits")
async def _limits(service: _Service) -> Response[bytes]:
    return json_response(LimitsView(service.limits()))


@patch(
    "/v1/limits",
    operation_id="setLimits",
    tags=["limits"],
    summary="Change limits until the next start",
    description="What is left out stays. Lowering lets running work finish.",
)
async def _set_limits(request: _Ask, service: _Service) -> Response[bytes]:
    return json_response(LimitsView(await service.set_limits(await body_of(request, LimitsChange))))


JOB_ROUTES: Final = (_submit, _list, _one, _dataset, _cancel, _follow, _follow_all, _limits, _set_limits)
