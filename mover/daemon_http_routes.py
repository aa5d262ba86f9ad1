"""The routes of jobs and limits: a request in, a call of the service, its answer out."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from litestar import Request, Response, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.exceptions import HTTPException
from litestar.openapi import ResponseSpec
from litestar.params import HeaderParameter, PathParameter, QueryParameter, SkipValidation

from mover.api import DatasetView, JobOrder, JobPage, JobState, JobView, LimitsChange, LimitsView
from mover.daemon_http_access import Caller
from mover.daemon_http_bodies import check_order, decode_body
from mover.daemon_http_streams import EventStream, Streams
from mover.daemon_jobs import JobService

__all__ = ["JOB_ROUTES", "body_of", "caller_of", "idempotency_key", "json_response"]

T = TypeVar("T")

_JSON: Final = "application/json"
_KEY_FORM: Final = "1 to 255 printable ASCII characters without blanks"

_Service = NamedDependency[SkipValidation[JobService]]
_Streams = NamedDependency[SkipValidation[Streams]]
_Ask = Request[Any, Any, Any]
_JobId = Annotated[str, PathParameter(description="the job's id")]
_DatasetId = Annotated[
    str, QueryParameter(min_length=1, max_length=1024, description="PID of a dataset, with its slash")
]
_OfDataset = Annotated[
    str, QueryParameter(max_length=1024, name="dataset_id", description="with this dataset; '': any")
]
_Key = Annotated[
    str,
    HeaderParameter(
        name="Idempotency-Key",
        pattern=r"^[!-~]{0,255}$",
        description=f"the caller's own key of the order, {_KEY_FORM}: sent again with it, the order is the same job",
    ),
]
_LastEventId = Annotated[
    str,
    HeaderParameter(
        name="Last-Event-ID", pattern="^[0-9]{0,15}$", description="number of the last event that was received"
    ),
]
_After = Annotated[int, QueryParameter(ge=0, le=10**15 - 1, description="the same, for those who cannot send headers")]


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


def idempotency_key(given: str) -> str:
    """The key; with quotation marks around it, as structured headers have them, or without."""
    return given[1:-1] if len(given) > 1 and given[0] == given[-1] == '"' else given


@post(
    "/v1/jobs",
    operation_id="submitJob",
    tags=["jobs"],
    summary="Order a job",
    description="Accepted is what has been made durable. The answer does not wait for the work.",
    status_code=202,
    responses={200: ResponseSpec(JobView, description="the job that the key had ordered before")},
)
async def _submit(request: _Ask, service: _Service, idempotency_key_: _Key = "") -> Response[bytes]:
    order = await body_of(request, JobOrder)
    await check_order(order)
    key = idempotency_key(idempotency_key_)
    job, new = await service.submit(order, owner=caller_of(request).name, key=key)
    return json_response(job, 202 if new else 200, {"Location": f"/v1/jobs/{job.id}"})


@get("/v1/jobs", operation_id="listJobs", tags=["jobs"], summary="Jobs, newest first, without changes and reports")
async def _list(
    service: _Service,
    state_: Annotated[JobState | Literal[""], QueryParameter(name="state", description="in this state; '': any")] = "",
    owner: Annotated[str, QueryParameter(description="on this account; '': any")] = "",
    of_dataset: _OfDataset = "",
    before: Annotated[str, QueryParameter(description="`next` of the page before")] = "",
    limit: Annotated[int, QueryParameter(ge=1, le=1000)] = 100,
) -> Response[bytes]:
    page: JobPage = await service.jobs(
        state=state_ or None, owner=owner or None, dataset_id=of_dataset or None, before=before, limit=limit
    )
    return json_response(page)


@get("/v1/jobs/{job_id:str}", operation_id="getJob", tags=["jobs"], summary="One job, with its changes and reports")
async def _one(request: _Ask, service: _Service, job_id: _JobId) -> Response[bytes]:
    job = await service.job(job_id)
    shown = tuple(_shown(dataset, caller_of(request)) for dataset in job.datasets)
    return json_response(msgspec.structs.replace(job, datasets=shown))


@get(
    "/v1/jobs/{job_id:str}/dataset",
    operation_id="getDataset",
    tags=["jobs"],
    summary="One dataset of a job, with its report however long it is",
    description="Links of a retrieval are told to those who may operate.",
)
async def _dataset(request: _Ask, service: _Service, job_id: _JobId, dataset_id: _DatasetId) -> Response[bytes]:
    return json_response(_shown(await service.dataset(job_id, dataset_id), caller_of(request)))


def _shown(dataset: DatasetView, caller: Caller) -> DatasetView:
    """As the caller may see it: links are good for whoever has them, and not for everybody who may read."""
    report = dataset.report
    if caller.role != "read" or report is None or "script" not in report:
        return dataset
    objects = [{**item, "url": ""} for item in report["objects"]]
    return msgspec.structs.replace(dataset, report={**report, "objects": objects, "script": ""})


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
    service: _Service, streams: _Streams, job_id: _JobId, last_event_id: _LastEventId = "", after: _After = 0
) -> EventStream:
    return EventStream(service.events(job_id, _number(last_event_id, after)), streams)


@get(
    "/v1/events",
    operation_id="followAll",
    tags=["events"],
    summary="Events of all jobs, from now on",
    description=(
        "Server-sent events without an end; the data of each is a JobEvent. Numbers grow within a job: `Last-Event-ID`"
        " means nothing here. Whoever comes back is told how what is in work stands; the jobs tell what has changed."
    ),
)
async def _follow_all(service: _Service, streams: _Streams) -> EventStream:
    return EventStream(service.all_events(), streams)


def _number(last_event_id: str, after: int) -> int:
    return int(last_event_id) if last_event_id else after  # browsers have none at first


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
