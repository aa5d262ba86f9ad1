"""Jobs in SciCat: read, listed and updated through version 4 of the API, or version 3 where there is no other.

An update that runs the site's actions (e-mail, other services) may be stored and answered with an error all the same:
what it did is read back before anything is repeated.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from itertools import product
from typing import Any, Literal

import msgspec

from mover.catalogue import CatalogueJob, JobDataset
from mover.errors import CatalogueTransientError, JobNotFoundError, MoverError
from mover.scicat_http import SciCatSession, segment
from mover.scicat_reply import Call, Reply, message_of

__all__ = ["Jobs"]

_FIRST_LIMIT = 100
_Send = Callable[[Call], Awaitable[Reply]]


class Jobs:
    """The jobs of a server."""

    def __init__(self, session: SciCatSession) -> None:
        self._session = session
        self._api: Literal["v3", "v4"] = "v4" if session.has_v4 else "v3"

    @property
    def api(self) -> Literal["v3", "v4"]:
        """The version in use: 4 until a server turns out not to have it."""
        return self._api

    async def read(self, job_id: str) -> CatalogueJob:
        """One job.  Raises JobNotFoundError."""
        return await self._read(job_id, self._session.call)

    async def probe(self) -> None:
        """Asks for one job of any kind, to see whether it may and which version the server has."""
        query = {"filter": '{"limits":{"limit":1}}'}
        (await self._send(Call("list jobs of", "any kind", "GET", "jobs", query=query), self._session.call)).records()

    async def every(self, kinds: Sequence[str], status_codes: Sequence[str]) -> list[CatalogueJob]:
        """All jobs of these kinds in one of these states, oldest first."""
        await self._session.identity()  # nobody in particular would see none
        found: dict[str, CatalogueJob] = {}
        for kind, status_code in product(dict.fromkeys(kinds), dict.fromkeys(status_codes)):
            for job in await self._of(kind, status_code):
                if job.kind == kind and job.status_code == status_code:
                    found[job.job_id] = job
        return sorted(found.values(), key=lambda job: (job.created_at, job.job_id))

    async def update(self, job_id: str, status_code: str, status_message: str, result: dict[str, Any] | None) -> None:
        """Sets the state of a job.  Raises JobNotFoundError."""
        path = _path(job_id)
        sent_result = msgspec.json.decode(msgspec.json.encode(result))
        wanted = {"jobResultObject": result} if result is not None else {}

        tried = False

        async def is_stored() -> bool:
            job = await self._read(job_id, self._session.call_once)
            same_message = self._api == "v3" or job.status_message == status_message
            return job.status_code == status_code and same_message and (result is None or job.result == sent_result)

        async def patch() -> None:
            nonlocal tried
            if tried and await is_stored():
                return
            tried = True
            failure: MoverError
            try:
                reply = await self._patch(job_id, path, status_code, status_message, wanted)
            except CatalogueTransientError as error:
                failure = error
            else:
                if reply.ok:
                    return
                _check_found(reply, job_id)
                failure = reply.refused()
            if not await is_stored():
                raise failure

        await self._session.repeating(patch)

    async def _patch(
        self, job_id: str, path: str, status_code: str, status_message: str, more: dict[str, Any]
    ) -> Reply:
        bodies = {
            "v4": {"statusCode": status_code, "statusMessage": status_message, **more},
            "v3": {"jobStatusMessage": status_code, **more},
        }

        async def send() -> Reply:
            body = msgspec.json.encode(bodies[self._api])
            return await self._session.call_once(Call("update job", job_id, "PATCH", path, self._api, body=body))

        reply = await send()
        return await send() if self._falls_back(reply) else reply

    async def _read(self, job_id: str, send: _Send) -> CatalogueJob:
        reply = await self._send(Call("read job", job_id, "GET", _path(job_id)), send)
        _check_found(reply, job_id)
        return _job(reply, reply.record())

    async def _of(self, kind: str, status_code: str) -> list[CatalogueJob]:
        """The limit grows until it is not reached: version 4 applies it before it skips, so pages would be empty."""
        limit = _FIRST_LIMIT
        while True:
            call = Call("list jobs of kind", kind, "GET", "jobs", query=_query(kind, status_code, limit))
            if self._api == "v3":
                call = _v3_list(kind, limit)
            reply = await self._session.call(msgspec.structs.replace(call, api=self._api))
            if self._falls_back(reply):
                continue
            records = reply.records()
            if len(records) < limit:
                return [_job(reply, record) for record in records]
            limit *= 2

    async def _send(self, call: Call, send: _Send) -> Reply:
        reply = await send(msgspec.structs.replace(call, api=self._api))
        if self._falls_back(reply):
            reply = await send(msgspec.structs.replace(call, api=self._api))
        return reply

    def _falls_back(self, reply: Reply) -> bool:
        """Whether the server has just turned out to have no jobs in version 4; from now on, version 3 is asked."""
        if reply.no_route and reply.call.api == "v4":
            self._api = "v3"
            return True
        return False


def _path(job_id: str) -> str:
    if not job_id.strip("."):
        raise JobNotFoundError(job_id, "this is no id of a job")
    return f"jobs/{segment(job_id)}"


def _query(kind: str, status_code: str, limit: int) -> dict[str, str]:
    where = {"type": kind, "statusCode": status_code}
    limits = {"limit": limit, "sort": {"createdAt": "asc"}}
    return {"filter": msgspec.json.encode({"where": where, "limits": limits}).decode()}


def _v3_list(kind: str, limit: int) -> Call:
    """By kind only: the state has another name in each release."""
    query = {"fields": {"type": kind}, "limits": {"limit": limit, "skip": 0}}
    encoded = {name: msgspec.json.encode(value).decode() for name, value in query.items()}
    return Call("list jobs of kind", kind, "GET", "jobs/fullquery", query=encoded)


def _check_found(reply: Reply, job_id: str) -> None:
    """An unknown id, or one that the account may not see, is status 400; 404 is about a dataset of the job."""
    unknown = reply.status == 400 and "invalid job id" in message_of(reply.body).lower()
    if unknown or reply.missing:
        raise JobNotFoundError(job_id, reply.reason)


def _job(reply: Reply, record: dict[str, Any]) -> CatalogueJob:
    """A job in the form of either version; version 3 has the datasets at the top, and one text for the state."""
    job_id = record.get("id") or record.get("_id")
    kind, status_code = record.get("type"), record.get("statusCode") or record.get("jobStatusMessage")
    if not (isinstance(job_id, str) and isinstance(kind, str) and isinstance(status_code, str)):
        raise reply.unreadable()
    parameters = _dict(record.get("jobParams"))
    listed = record.get("datasetList")
    if listed is None:
        listed = parameters.get("datasetList") or []
    if not isinstance(listed, list):
        raise reply.unreadable()
    return CatalogueJob(
        job_id=job_id,
        kind=kind,
        status_code=status_code,
        status_message=str(record.get("statusMessage") or record.get("jobStatusMessage") or ""),
        datasets=tuple(_dataset(reply, item) for item in listed),
        created_at=str(record.get("createdAt") or record.get("creationTime") or ""),
        result=_dict(record.get("jobResultObject")),
    )


def _dataset(reply: Reply, item: object) -> JobDataset:
    pid = item.get("pid") if isinstance(item, dict) else None
    files = (item.get("files") or []) if isinstance(item, dict) else None
    if not isinstance(pid, str) or not isinstance(files, list) or not all(isinstance(path, str) for path in files):
        raise reply.unreadable()
    return JobDataset(pid, tuple(files))


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
