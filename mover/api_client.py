"""The daemon's client: jobs ordered, followed and cancelled from elsewhere, over restarts of the daemon."""

from __future__ import annotations

import random
import ssl
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlsplit

import anyio
import anyio.to_thread
import httpx
import msgspec

from mover.api import (
    DatasetView,
    JobEvent,
    JobOrder,
    JobPage,
    JobState,
    JobView,
    LimitsChange,
    LimitsView,
    LimitView,
    is_final,
)
from mover.api_problems import refusal_of
from mover.api_tokens import first_token, read_token_file
from mover.errors import ConfigError, DaemonTransientError, MissingFilesError, MoverError
from mover.policies.retry import Progressing, RetryPolicy, delay_s, retrying
from mover.settings_rules import Secret

__all__ = ["PATIENCE", "DaemonAccess", "DaemonClient", "daemon_access"]

T = TypeVar("T")

PATIENCE: Final = RetryPolicy(attempts=12, base_s=0.5, cap_s=15.0, throttle_base_s=1.0)
"""Outlasts a restart of the daemon: a minute or more."""

_CONNECT_S: Final = 10.0
_READ_S: Final = 60.0
_SILENCE_S: Final = 60.0  # of an event stream, which has a comment every 15 s: the connection is lost then
_LISTED: Final = 1000
_URL_FORM: Final = "http://host[:port], https://host[:port] or unix:/path/of/a/socket, without credentials"


class DaemonAccess(msgspec.Struct, frozen=True):
    """Where a daemon is; ``token``: the client's, None where there is none."""

    url: str
    token: Secret | None = None


def daemon_access(url: str, token_file: Path | None = None) -> DaemonAccess:
    """How to reach a daemon. Blocking.  Raises ConfigError for what is no address, or for a bad token file."""
    parts = urlsplit(url)
    socket = url.startswith("unix:/") and len(url) > len("unix:/")
    host = parts.scheme in {"http", "https"} and parts.hostname and not parts.username and parts.path in {"", "/"}
    if not socket and not (host and not parts.query and not parts.fragment):
        shown = Secret("") if "@" in url else url
        raise ConfigError("MOVER_URL", shown, _URL_FORM)
    return DaemonAccess(url.rstrip("/"), None if token_file is None else first_token(read_token_file(token_file)))


class DaemonClient:
    """Open it with :meth:`open`. What it raises is a MoverError, with the exit code that the same would have here."""

    def __init__(self, client: httpx.AsyncClient, access: DaemonAccess, retry: RetryPolicy) -> None:
        self._client, self._access, self._retry = client, access, retry

    @classmethod
    @asynccontextmanager
    async def open(
        cls, access: DaemonAccess, *, retry: RetryPolicy = PATIENCE, read_timeout_s: float = _READ_S
    ) -> AsyncIterator[DaemonClient]:
        """A client over a pool of connections; nothing is sent before the first call.

        ``retry``: for calls that may be repeated while the daemon is away.
        """
        headers = {"Accept": "application/json", "User-Agent": "mover"}
        if access.token is not None:
            headers["Authorization"] = f"Bearer {access.token.reveal()}"
        socket = access.url.removeprefix("unix:") if access.url.startswith("unix:") else None
        make_client = partial(
            _make_client, socket, access.url, headers, httpx.Timeout(read_timeout_s, connect=_CONNECT_S, pool=None)
        )
        # The certificates of the authorities are files.
        async with await anyio.to_thread.run_sync(make_client) as client:
            yield cls(client, access, retry)

    async def submit(self, order: JobOrder, *, key: str = "") -> JobView:
        """Orders a job; with a ``key`` that was used before, it is that one. Without, one is made for the retries.

        Raises:
            OrderRefusedError, KeyConflictError: the daemon refuses the order, or has another one under the key.
            DaemonTransientError: it is away, or has no room.
            DaemonAccessError: it lets nobody like this order anything.
        """
        headers = {"Idempotency-Key": key or uuid.uuid4().hex, "Content-Type": "application/json"}
        return await self._call(JobView, "POST", "/v1/jobs", content=msgspec.json.encode(order), headers=headers)

    async def job(self, job_id: str) -> JobView:
        """One job, with its changes and reports.  Raises UnknownJobError, and as ``submit``."""
        return await self._call(JobView, "GET", _path(job_id), job_id=job_id)

    async def dataset(self, job_id: str, dataset_id: str) -> DatasetView:
        """One dataset of a job, with its report.  Raises as ``job``."""
        path = f"{_path(job_id)}/dataset"
        return await self._call(DatasetView, "GET", path, params={"dataset_id": dataset_id}, job_id=job_id)

    async def jobs(
        self,
        *,
        state: JobState | None = None,
        owner: str | None = None,
        dataset_id: str | None = None,
        limit: int = _LISTED,
    ) -> AsyncIterator[JobView]:
        """Jobs, newest first, at most ``limit``, without changes and reports.  Raises as ``submit``."""
        wanted = {"state": state, "owner": owner, "dataset_id": dataset_id}
        query = {name: value for name, value in wanted.items() if value is not None}
        left, before = limit, ""
        while left > 0:
            params = query | {"before": before, "limit": str(min(left, _LISTED))}
            page = await self._call(JobPage, "GET", "/v1/jobs", params=params)
            for job in page.jobs:
                yield job
            left, before = left - len(page.jobs), page.next
            if not before:
                return

    async def cancel(self, job_id: str) -> JobView:
        """Ends a job; one that has ended stays as it is.  Raises as ``job``."""
        return await self._call(JobView, "DELETE", _path(job_id), job_id=job_id)

    async def limits(self) -> tuple[LimitView, ...]:
        """The limits.  Raises as ``submit``."""
        return (await self._call(LimitsView, "GET", "/v1/limits")).limits

    async def set_limits(self, change: LimitsChange) -> tuple[LimitView, ...]:
        """Changes limits.  Raises as ``submit``."""
        body, headers = msgspec.json.encode(change), {"Content-Type": "application/json"}
        return (await self._call(LimitsView, "PATCH", "/v1/limits", content=body, headers=headers)).limits

    async def follow(
        self, job_id: str, after: int = 0, *, on_pause: Callable[[MoverError], None] = lambda _: None
    ) -> AsyncGenerator[JobEvent, None]:
        """The job's events above number ``after``, to its end, each once, whatever happens to the connection.

        ``on_pause`` is told why the stream broke, once each time. Close the iterator (``contextlib.aclosing``).

        Raises:
            UnknownJobError: there is no such job.
            DaemonTransientError: the daemon stays away.
            DaemonAccessError: it lets nobody like this read.
        """
        last, progress, told = after, Progressing(), False
        while True:
            try:
                async with aclosing(self._stream(job_id, last)) as events:
                    async for event in events:
                        progress.advanced()
                        last, told = event.number, False
                        yield event
                        if event.type == "end":
                            return
                if is_final((await self.job(job_id)).state):
                    return  # all was told before ``after``
                error: MoverError = DaemonTransientError(self._access.url, "the event stream ended early")
            except DaemonTransientError as caught:
                error = caught
            if not told:
                on_pause(error)
                told = True
            pause_s = delay_s(self._retry, progress.failed(), error, random.random)
            if pause_s is None:
                raise error
            await anyio.sleep(pause_s)

    async def result(self, job: JobView) -> JobView:
        """The job with all reports and failures whole, also those that are too long for one answer."""
        datasets = []
        for dataset in job.datasets:
            cut = dataset.state == "done" and dataset.report is None
            if (failure := dataset.failure) is not None and failure.kind == MissingFilesError.__name__:
                cut = not failure.missing and not failure.wrong_size
            datasets.append(await self.dataset(job.id, dataset.dataset_id) if cut else dataset)
        return msgspec.structs.replace(job, datasets=tuple(datasets))

    async def _stream(self, job_id: str, after: int) -> AsyncGenerator[JobEvent, None]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        timeout = httpx.Timeout(_SILENCE_S, connect=_CONNECT_S, pool=None)
        try:
            async with self._client.stream(
                "GET", f"{_path(job_id)}/events", headers=headers, timeout=timeout
            ) as response:
                if response.status_code != httpx.codes.OK:
                    await response.aread()
                    if not response.is_success:
                        raise refusal_of(
                            response.status_code, response.content, response.headers, self._access.url, job_id
                        )
                    return
                async for line in response.aiter_lines():
                    if line.startswith("data:"):
                        yield _decoded(JobEvent, line[5:].strip().encode(), self._access.url)
        except httpx.HTTPError as error:
            raise self._away(error) from error

    async def _call(self, kind: type[T], method: str, path: str, *, job_id: str = "", **request: Any) -> T:  # noqa: ANN401 - httpx's own
        async def once() -> T:
            try:
                response = await self._client.request(method, path, **request)
            except httpx.HTTPError as error:
                raise self._away(error) from error
            if not response.is_success:
                raise refusal_of(response.status_code, response.content, response.headers, self._access.url, job_id)
            return _decoded(kind, response.content, self._access.url)

        return await retrying(once, self._retry)

    def _away(self, error: httpx.HTTPError) -> MoverError:
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return ConfigError("MOVER_URL", self._access.url, f"a daemon whose certificate is valid ({cause})")
            cause = cause.__cause__ or cause.__context__
        return DaemonTransientError(self._access.url, reason)


def _make_client(socket: str | None, url: str, headers: dict[str, str], patience: httpx.Timeout) -> httpx.AsyncClient:
    if socket is None:
        return httpx.AsyncClient(base_url=url, headers=headers, timeout=patience, follow_redirects=False)
    transport = httpx.AsyncHTTPTransport(uds=socket)
    return httpx.AsyncClient(base_url="http://localhost", transport=transport, headers=headers, timeout=patience)


def _path(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _decoded(kind: type[T], content: bytes, url: str) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.MsgspecError as error:
        raise DaemonTransientError(url, "an answer that is not the daemon's") from error
