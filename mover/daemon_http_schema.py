"""The OpenAPI document: what litestar reads from the routes, and what it cannot know of bodies, answers and access."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Final

import msgspec
from litestar import Request
from litestar.enums import MediaType
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, OpenAPIRenderPlugin

from mover import __version__
from mover.api import DatasetView, JobEvent, JobOptions, JobOrder, JobPage, JobView, LimitsChange, LimitsView, Problem
from mover.daemon_health import Readiness
from mover.daemon_http_bodies import OPTIONS_OF_KIND
from mover.daemon_http_docs import page
from mover.daemon_http_problems import PROBLEM_TYPE
from mover.daemon_scicat import TriggerReply
from mover.daemon_watchdog import Liveness
from mover.policies.names import MAX_DATASET_ID_BYTES

__all__ = ["completed", "openapi_config"]

_REF: Final = "#/components/schemas/{name}"
_Document = dict[str, Any]

# A PID that ``check_dataset_id`` lets pass.
_PID: Final = (
    r"^(?![.\s])(?!.*\s$)(?!.*%[0-9A-Fa-f]{2})(?!(?:.*/)?(?:\.{1,2}|raw_files|datablocks)?(?:/|$))"
    r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]+$"
)
# A path that ``check_path`` lets pass, of a file or with its slash of a folder.
_FILE: Final = r"^(?!/)(?!(?:[^\x00]*/)?\.{1,2}(?:/|(?![^\x00])))(?![^\x00]*/{2})[^\x00]+$"

_PROBLEMS: Final = {
    400: "a field, a header or a parameter has a value that is not allowed",
    401: "no token, or one that is not known",
    403: "the token may only read, a page of another site asks, or a daemon without tokens is called by a foreign name",
    404: "no such job",
    409: "the key belongs to another order, or the order asks for `registered` and the daemon has no catalogue",
    413: "the body is longer than 4 MiB",
    415: "the body is of another type",
    429: "the queue is full",
    503: "the daemon is starting or stopping, or its journal cannot be written",
}
_PATIENT: Final = frozenset({429, 503})
_BODY: Final = (400, 413, 415)
# By operation: statuses with the type of the body and a description; statuses with a problem document.
# Events are a str, other text is bytes; of several types the caller has the choice.
_ANSWERS: Final[dict[str, tuple[dict[int, tuple[Any, str]], tuple[int, ...]]]] = {
    "submitJob": (
        {202: (JobView, "a new job, made durable"), 200: (JobView, "the job that was ordered with the key before")},
        (*_BODY, 409, 429, 503),
    ),
    "listJobs": ({200: (JobPage, "a page of jobs")}, (400, 503)),
    "getJob": ({200: (JobView, "the job")}, (404, 503)),
    "getDataset": ({200: (DatasetView, "the dataset")}, (400, 404, 503)),
    "cancelJob": ({200: (JobView, "the job, which has ended")}, (404, 503)),
    "followJob": ({200: (str, "events"), 204: (None, "the job has ended, and all is told")}, (400, 404, 503)),
    "followAll": ({200: (str, "events")}, (503,)),
    "getLimits": ({200: (LimitsView, "all limits")}, (503,)),
    "setLimits": ({200: (LimitsView, "all limits, changed")}, (*_BODY, 503)),
    "triggerScicatJob": (
        {
            202: (TriggerReply, "taken: it runs, or is started as soon as possible"),
            200: (TriggerReply, "nothing to do, and why"),
        },
        (400, 413, 404, 409, 429, 503),
    ),
    "live": ({200: (Liveness, "the loop lives")}, ()),
    "ready": (
        {
            200: ((Readiness, bytes), "everything that is needed works"),
            503: ((Readiness, bytes), "something that is needed does not work"),
        },
        (),
    ),
    "metrics": ({200: (bytes, "the metrics")}, ()),
}
_BODIES: Final = {"submitJob": "JobOrder", "setLimits": "LimitsChange"}


def openapi_config() -> OpenAPIConfig:
    """For the application: the document at /schema/openapi.json, and a page of it at /schema."""
    return OpenAPIConfig(
        title="mover",
        version=__version__,
        description="Archives datasets from S3 to long-term storage and back: jobs, their events, limits.",
        path="/schema",
        render_plugins=[_Page(path="/", media_type=MediaType.HTML), _Json()],
    )


class _Json(JsonRenderPlugin):
    def render(self, request: Request[Any, Any, Any], openapi_schema: _Document) -> bytes:
        """The document."""
        return self.render_json(request, _cached(_Held(openapi_schema)))


class _Page(OpenAPIRenderPlugin):
    def render(self, request: Request[Any, Any, Any], openapi_schema: _Document) -> bytes:
        """The page, or for those who accept JSON alone the document."""
        accepted = request.headers.get("accept", "")
        document = _cached(_Held(openapi_schema))
        if "json" in accepted and "html" not in accepted:
            return self.render_json(request, document)
        return page(document).encode()


class _Held:
    """A document as a key of the cache."""

    def __init__(self, document: _Document) -> None:
        self.document = document

    def __hash__(self) -> int:
        return id(self.document)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and other.document is self.document


@lru_cache(maxsize=4)
def _cached(held: _Held) -> _Document:
    return completed(held.document)


def completed(document: _Document) -> _Document:
    """Litestar's document with the bodies, the answers and the access of the operations here."""
    done: _Document = msgspec.json.decode(msgspec.json.encode(document))
    components = done.setdefault("components", {})
    components["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "a token of the daemon's token file"},
        "basic": {"type": "http", "scheme": "basic", "description": "a token's name, and the token as password"},
    }
    components["schemas"] = components.get("schemas", {}) | _schemas()
    for path, operations in done["paths"].items():
        for operation in operations.values():
            _complete(operation, path)
    return done


def _complete(operation: _Document, path: str) -> None:
    name = operation.get("operationId", "")
    is_open = path.startswith(("/livez", "/readyz"))
    answers, problems = _ANSWERS.get(name, ({}, ()))
    responses: _Document = {} if answers else operation.setdefault("responses", {})
    for status, (kind, text) in answers.items():
        responses[str(status)] = {"description": text, "headers": _headers(name, status)} | _content(kind)
    for status in (*problems, *(() if is_open else (401,)), 403):
        content = {PROBLEM_TYPE: {"schema": {"$ref": _REF.format(name="Problem")}}}
        text = f"{HTTPStatus(status).phrase}: {_PROBLEMS[status]}"
        responses[str(status)] = {"description": text, "headers": _headers(name, status), "content": content}
    operation["responses"] = dict(sorted(responses.items()))
    if not is_open:
        ways = ("bearer", "basic") if name == "triggerScicatJob" else ("bearer",)
        operation["security"] = [{}, *({way: []} for way in ways)]
    if name in _BODIES:
        content = {"application/json": {"schema": {"$ref": _REF.format(name=_BODIES[name])}}}
        operation["requestBody"] = {"required": True, "content": content}
    elif name == "triggerScicatJob":
        order = {"schema": {"$ref": _REF.format(name="CatalogueOrder")}}
        operation["requestBody"] = {"required": True, "content": {"application/json": order}}


def _headers(name: str, status: int) -> _Document:
    headers: _Document = {"X-Request-Id": {"schema": {"type": "string"}, "required": True}}
    if status in _PATIENT and name != "ready":
        headers["Retry-After"] = {"schema": {"type": "integer"}, "description": "seconds", "required": True}
    if name == "submitJob" and status < HTTPStatus.BAD_REQUEST:
        headers["Location"] = {"schema": {"type": "string"}, "description": "the job", "required": True}
    return headers


def _content(kind: Any) -> _Document:  # noqa: ANN401 - a type, several, or none
    if kind is None:
        return {}
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return {"content": dict(_media(item) for item in kinds)}


def _media(kind: type[Any]) -> tuple[str, _Document]:
    if kind is str:
        event = {"id": {"type": "string"}, "event": {"enum": ["state", "progress", "end"]}, "data": {"type": "string"}}
        return "text/event-stream", {"schema": {"type": "object", "properties": event}}
    if kind is bytes:
        return "text/plain", {"schema": {"type": "string"}}
    return "application/json", {"schema": {"$ref": _REF.format(name=kind.__name__)}}


def _schemas() -> _Document:
    told = (JobView, JobPage, DatasetView, JobEvent, LimitsView, Problem, TriggerReply, Liveness, Readiness)
    _, schemas = msgspec.json.schema_components((JobOrder, LimitsChange, *told), ref_template=_REF)
    order = schemas.pop("JobOrder")
    names = []
    for name, variant in _orders(order["properties"]):
        schemas[name] = variant
        names.append(name)
    schemas["JobOrder"] = {"description": order["description"]} | {
        "oneOf": [{"$ref": _REF.format(name=name)} for name in names]
    }
    schemas["CatalogueOrder"] = {
        "description": "What a `url` action of SciCat sends: a job of any version, or at least these two fields."
        " Its state may be missing or null.",
        "type": "object",
        "required": ["id", "type"],
        "properties": {
            "id": {"type": "string", "pattern": r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,199}$"},
            "type": {"type": "string", "minLength": 1, "description": "archive and retrieve are taken"},
            "statusCode": {"type": ["string", "null"], "description": "only jobs that are `jobSubmitted` are begun"},
            "jobStatusMessage": {"type": ["string", "null"], "description": "the same, in older versions"},
        },
    }
    return schemas


def _orders(properties: _Document) -> Iterator[tuple[str, _Document]]:
    """An order of each kind, with the options that belong to it; single files go with a single dataset."""
    for kind, options in OPTIONS_OF_KIND.items():
        name = f"{kind.capitalize()}Order"
        if "files" not in options:
            yield name, _order(properties, kind, options)
            continue
        yield name, _order(properties, kind, tuple(option for option in options if option != "files"))
        single = _order(properties, kind, options)
        single["properties"]["dataset_ids"]["maxItems"] = 1
        single["properties"]["options"]["required"] = ["files"]
        single["required"].append("options")
        yield f"{kind.capitalize()}FilesOrder", single


def _order(properties: _Document, kind: str, options: tuple[str, ...]) -> _Document:
    fields = msgspec.json.schema_components((JobOptions,), ref_template=_REF)[1]["JobOptions"]["properties"]
    pid = {"type": "string", "pattern": _PID, "minLength": 1, "maxLength": MAX_DATASET_ID_BYTES, "title": "PID"}
    if "files" in options:
        path = {"pattern": _FILE} | fields["files"]["items"]
        # in words: so many names may also be longer than a body may be, which is another answer
        fields["files"] = {"type": "array", "minItems": 1, "items": path, "description": "10,000 at most"}
    own = {name: field if name in options else {"const": field["default"]} for name, field in fields.items()}
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["kind", "dataset_ids"],
        "properties": properties
        | {
            "kind": {"const": kind},
            "dataset_ids": {"type": "array", "minItems": 1, "maxItems": 10_000, "items": pid},
            "options": {"type": "object", "additionalProperties": False, "properties": own},
        },
    }
