"""Flow runs for jobs of the catalogue, started through Prefect's REST interface; Prefect itself is not needed here."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import anyio.to_thread
import httpx
import msgspec

from mover.daemon_http_bodies import BodyError, field_error
from mover.errors import ConfigError, MoverError
from mover.jobs_lifecycle import JobKind
from mover.settings_rules import Secret

__all__ = ["DEPLOYMENTS", "PrefectAwayError", "PrefectRefusedError", "PrefectStarter", "check_job_id"]

DEPLOYMENTS: Final[dict[JobKind, str]] = {
    "archive": "archive_datasetlist/datasets_archival",
    "retrieve": "retrieve_datasetlist/datasets_retrieval",
}
"""Deployment that runs each kind of job."""

_JOB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,199}")
_JOB_ID_FORM: Final = "1 to 200 of letters, digits and . _ : -"
_CALL_S: Final = 30.0
_PASSING: Final = frozenset({httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_MANY_REQUESTS})
_NOT_LET_IN: Final = frozenset({httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN})
_STRANGER: Final = "PREFECT_API_AUTH_STRING is not the secret that the server was started with"
_SHOWN_CHARACTERS: Final = 300


class PrefectRefusedError(MoverError):
    """The Prefect server does not do what it is asked for."""

    def __init__(self, url: str, reason: str) -> None:
        self.url, self.reason = url, reason
        super().__init__(f"Prefect at {url}: {reason}")


class PrefectAwayError(PrefectRefusedError):
    """The Prefect server is away, or too busy."""

    retryable = True


def check_job_id(job_id: str) -> None:
    """Lets the id of a catalogue's job pass: it becomes part of paths and names.  Raises BodyError."""
    if not _JOB_ID.fullmatch(job_id):
        detail = f"id: allowed are {_JOB_ID_FORM}"
        raise BodyError(detail, (field_error("id", job_id, _JOB_ID_FORM),))


class PrefectStarter:
    """Starts the deployment of each kind of job: one run for a job, like the reconciler's first.

    ``url``: the server's, without what may be secret in it.
    """

    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self._client, self.url = client, url

    @classmethod
    @asynccontextmanager
    async def open(cls, api_url: str, auth: Secret | None = None) -> AsyncIterator[PrefectStarter]:
        """A starter over a pool of connections. ``auth``: ``user:password``, as PREFECT_API_AUTH_STRING has it."""
        user, _, password = auth.reveal().partition(":") if auth is not None else ("", "", "")
        make_client = partial(
            httpx.AsyncClient,
            base_url=api_url.rstrip("/") + "/",
            auth=httpx.BasicAuth(user, password) if auth is not None else None,
            timeout=_CALL_S,
            headers={"Accept": "application/json", "User-Agent": "mover"},
        )
        # The certificates of the authorities are files.
        async with await anyio.to_thread.run_sync(make_client) as client:
            yield cls(client, str(httpx.URL(api_url).copy_with(userinfo=b"")))

    async def check(self) -> None:
        """Returns when jobs of each kind could be started now.  Raises as ``start``."""
        for kind in DEPLOYMENTS:
            await self._deployment(kind)

    async def start(self, kind: JobKind, job_id: str) -> str:
        """See ``Starter``; returns the id of the flow run.

        Raises:
            PrefectAwayError, PrefectRefusedError: the server is away; it refuses.
            ConfigError: the deployment does not exist.
        """
        deployment_id = await self._deployment(kind)
        run = {
            "parameters": {"job_id": job_id},
            "name": f"{kind} job {job_id}",
            "idempotency_key": f"{kind}/{job_id}/1",
        }
        return self._field(await self._call("POST", f"deployments/{deployment_id}/create_flow_run", run), "id")

    async def _deployment(self, kind: JobKind) -> str:
        """Its id."""
        found = await self._call("GET", f"deployments/name/{DEPLOYMENTS[kind]}")
        if found.status_code == httpx.codes.NOT_FOUND:
            raise ConfigError(DEPLOYMENTS[kind], None, "a deployment; `python -m flows.deploy` creates it")
        return self._field(found, "id")

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            return await self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise PrefectAwayError(self.url, f"{type(error).__name__}: {error}") from error

    def _field(self, response: httpx.Response, name: str) -> str:
        if response.status_code in _NOT_LET_IN:
            raise PrefectRefusedError(self.url, f"status {response.status_code}: {_STRANGER}")
        if not response.is_success:
            passing = response.is_server_error or response.status_code in _PASSING
            reason = f"status {response.status_code}: {response.text[:_SHOWN_CHARACTERS]}"
            raise (PrefectAwayError if passing else PrefectRefusedError)(self.url, reason)
        try:
            return str(msgspec.json.decode(response.content)[name])
        except (msgspec.DecodeError, UnicodeError, KeyError, TypeError) as error:
            raise PrefectAwayError(self.url, "an answer that is not Prefect's") from error
