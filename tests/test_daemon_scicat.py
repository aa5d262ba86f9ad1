"""SciCat's trigger and the look at what it missed: with a catalogue over HTTP, a real engine, a real Prefect server."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import httpx
import msgspec
import pytest

from mover.catalogue import CatalogueJob
from mover.daemon_catalogue import CATALOGUE_OWNER, CatalogueStarter
from mover.daemon_jobs import JobService
from mover.daemon_prefect import DEPLOYMENTS, PrefectRefusedError, PrefectStarter
from mover.daemon_scicat import CatalogueTrigger
from mover.engine import Engine, EngineConfig
from mover.errors import ConfigError, JobNotFoundError, NotEnoughSpaceError
from mover.jobs_lifecycle import JobKind
from mover.policies.retry import RetryPolicy
from mover.scicat import SciCat
from mover.settings_rules import Secret
from tests.datasets import fresh_buckets, make_config, random_bytes, upload
from tests.http_daemons import OPERATOR, READER, TOKENS, Served, browser, serve
from tests.job_services import ended, open_service
from tests.prefect_servers import PrefectServer
from tests.scicat_clients import access_to
from tests.scicat_fake.server import ScicatServer
from tests.servers import S3Server

pytestmark = pytest.mark.anyio

PID = "20.500.11935/first"
FILES = {"a": random_bytes(5_000, 1), "b/c": random_bytes(7_000, 2)}
AT_ONCE = RetryPolicy(attempts=1)


class World:
    """A daemon with a catalogue."""

    def __init__(self, scicat: ScicatServer, service: JobService, starter: CatalogueStarter, served: Served) -> None:
        self.scicat, self.service, self.starter, self.served = scicat, service, starter, served

    async def tell(self, content: bytes | str, **headers: str) -> httpx.Response:
        async with browser(self.served, OPERATOR) as client:
            return await client.post("/v1/scicat/jobs", content=content, headers=headers)

    async def jobs(self) -> list[str]:
        return [job.catalogue_job for job in (await self.service.jobs()).jobs]


@pytest.fixture
def config(tmp_path: Path, moto_server: S3Server) -> Iterator[EngineConfig]:
    with fresh_buckets(moto_server) as buckets:
        upload(moto_server, buckets.landing_zone, FILES, PID)
        yield make_config(tmp_path, moto_server, buckets)


@pytest.fixture
async def world(
    config: EngineConfig, scicat_server: ScicatServer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    monkeypatch.setattr("mover.daemon_scicat._ANSWER_S", 20.0)  # each answer tells what came of it
    scicat_server.control.seed_dataset(PID, {name: len(body) for name, body in FILES.items()})
    async with (
        SciCat.open(access_to(scicat_server)) as catalogue,
        Engine.open(config, catalogue=catalogue) as engine,
        open_service(config, catalogue=catalogue) as service,
        CatalogueTrigger.open(starter := CatalogueStarter(service, catalogue, engine, grace_s=0.0)) as trigger,
        serve(service, TOKENS, scicat=trigger) as served,
    ):
        yield World(scicat_server, service, starter, served)


async def test_a_job_that_scicat_tells_of_is_done_and_shown_there_and_told_again_is_the_same(world: World) -> None:
    job_id = world.scicat.control.seed_job("archive", [PID])
    body = msgspec.json.encode({"id": job_id, "type": "archive", "jobParams": {"username": "x"}, "extra": [1]})
    first = await world.tell(body, **{"Content-Type": "text/plain;charset=UTF-8"})
    again = await world.tell(body, **{"Content-Type": "application/json"})
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json() == {"id": job_id, "action": "started", "reason": "", "run": first.json()["run"]}
    assert again.json()["run"] == first.json()["run"]
    job = await ended(world.service, first.json()["run"])
    assert (job.state, job.owner, job.options.release_source) == ("done", CATALOGUE_OWNER, True)
    assert await world.jobs() == [job_id]
    control = world.scicat.control
    assert control.job_statuses(job_id)[-1] == "finishedSuccessful"
    assert control.lifecycle(PID)["archiveStatusMessage"] == "datasetOnArchiveDisk"
    late = await world.tell(body)
    assert (late.status_code, late.json()["action"]) == (200, "ignored")


async def test_jobs_of_all_forms_are_read_and_what_is_none_of_ours_is_let_be(world: World) -> None:
    job_id = world.scicat.control.seed_job("archive", [PID])
    quoted = msgspec.json.encode(msgspec.json.encode({"_id": job_id, "type": "archive"}).decode())
    assert (await world.tell(quoted)).status_code == 202
    for body, status in (
        ({"id": "x-1", "type": "public"}, 200),
        ({"id": "x-1", "type": "archive", "statusCode": "inProgress"}, 200),
        ({"id": "x-1", "type": "archive", "jobStatusMessage": "finishedSuccessful"}, 200),
        ({"id": "x-1", "type": "archive"}, 404),
        ({"id": job_id, "_id": None, "type": "archive", "statusCode": None, "jobStatusMessage": None}, 202),
        ({"id": None, "_id": job_id, "type": "archive", "statusCode": "jobSubmitted"}, 202),
        ({"id": None, "type": "archive"}, 400),
        ({"id": job_id, "type": None}, 400),
        ({"id": job_id, "type": "retrieve"}, 409),
        ({"id": "../x", "type": "archive"}, 400),
        ({"type": "archive"}, 400),
        ({"id": job_id}, 400),
        ({"id": 7, "type": "archive"}, 400),
        ([], 400),
    ):
        answer = await world.tell(msgspec.json.encode(body))
        assert answer.status_code == status, (body, answer.text)
    assert (await world.tell("no json")).status_code == 400
    assert await world.jobs() == [job_id]


async def test_basic_and_bearer_are_taken_and_nobody_else_is(world: World) -> None:
    job_id = world.scicat.control.seed_job("archive", [PID])
    body = msgspec.json.encode({"id": job_id, "type": "archive"})

    def basic(user: str, password: str) -> dict[str, str]:
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}

    async with browser(world.served) as client:

        async def status(headers: dict[str, str]) -> int:
            return (await client.post("/v1/scicat/jobs", content=body, headers=headers)).status_code

        nobody = await client.post("/v1/scicat/jobs", content=body)
        assert nobody.status_code == 401
        assert "Basic" in nobody.headers["WWW-Authenticate"]
        assert await status(basic("scicat", OPERATOR + "x")) == 401
        assert await status(basic("eye", OPERATOR)) == 401
        assert await status(basic("eye", READER)) == 403
        assert await status({"Authorization": "Basic !!"}) == 401
        assert await world.jobs() == []
        assert await status(basic("scicat", OPERATOR)) == 202


async def test_a_job_that_ended_after_the_catalogue_listed_it_is_not_begun_again(
    config: EngineConfig, scicat_server: ScicatServer
) -> None:
    scicat_server.control.seed_dataset(PID, {name: len(body) for name, body in FILES.items()})
    job_id = scicat_server.control.seed_job("archive", [PID])
    listed: list[CatalogueJob] = []

    class Late(SciCat):
        """Lists what was there before."""

        async def jobs(self, kinds: Sequence[str], status_codes: Sequence[str]) -> AsyncIterator[CatalogueJob]:
            if not listed:
                listed.extend([job async for job in super().jobs(["archive"], status_codes)])
            for job in listed:
                if job.kind in kinds:
                    yield job

    async with (
        Late.open(access_to(scicat_server)) as catalogue,
        Engine.open(config, catalogue=catalogue) as engine,
        open_service(config, catalogue=catalogue) as service,
    ):
        starter = CatalogueStarter(service, catalogue, engine, grace_s=0.0)
        assert await starter.reconcile() == [job_id]
        await ended(service, (await service.jobs()).jobs[0].id)
        assert await starter.reconcile() == []
        assert len((await service.jobs()).jobs) == 1


async def test_jobs_that_nobody_told_of_are_found_and_started_once(world: World) -> None:
    job_id = world.scicat.control.seed_job("archive", [PID])
    elsewhere = world.scicat.control.seed_job("archive", [PID], status="inProgress")
    empty = world.scicat.control.seed_job("archive", [])
    assert set(await world.starter.reconcile()) == {job_id, empty}
    assert await world.starter.reconcile() == []
    assert await world.jobs() == [job_id]
    run = (await world.service.jobs()).jobs[0]
    await ended(world.service, run.id)
    assert world.scicat.control.job_statuses(job_id)[-1] == "finishedSuccessful"
    assert world.scicat.control.job_statuses(empty)[-1] == "finishedWithDatasetErrors"
    assert world.scicat.control.job_statuses(elsewhere) == ["inProgress"]


class Stubborn:
    """A starter that fails, or takes its time."""

    def __init__(self, error: Exception | None = None, pause_s: float = 0.0) -> None:
        self.error, self.pause_s = error, pause_s
        self.started: list[str] = []

    async def start(self, kind: JobKind, job_id: str) -> str:
        await anyio.sleep(self.pause_s)
        if self.error is not None:
            raise self.error
        self.started.append(f"{kind} {job_id}")
        return "run-1"


@asynccontextmanager
async def trigger_of(starter: Stubborn) -> AsyncIterator[CatalogueTrigger]:
    async with CatalogueTrigger.open(starter, retry=AT_ONCE) as trigger:
        yield trigger


async def test_the_answer_does_not_wait_for_a_slow_start_which_goes_on_once() -> None:
    starter = Stubborn(pause_s=1.2)
    async with trigger_of(starter) as trigger:
        replies = [await trigger.take("archive", "j") for _ in range(1)]
        replies.append(await trigger.take("archive", "j"))
        assert [reply.action for reply in replies] == ["taken", "started"]
    assert starter.started == ["archive j"]


async def test_a_start_that_fails_is_the_facilitys_matter_unless_there_is_no_such_job() -> None:
    async with trigger_of(Stubborn(PrefectRefusedError("http://p", "ConnectError"))) as trigger:
        assert (await trigger.take("archive", "j")).action == "taken"
    async with trigger_of(Stubborn(NotEnoughSpaceError(1, 1, 1, 1, 1.0))) as trigger:
        assert (await trigger.take("archive", "j")).action == "taken"
    async with trigger_of(Stubborn(KeyError("a defect"))) as trigger:  # which ends nothing else
        for _ in range(6):
            assert (await trigger.take("archive", "j")).action == "taken"
    async with trigger_of(Stubborn(JobNotFoundError("j", "gone"))) as trigger:
        with pytest.raises(JobNotFoundError):
            await trigger.take("archive", "j")


async def test_without_prefect_there_is_no_answer_and_no_secret_in_the_error() -> None:
    async with PrefectStarter.open("http://me:pw@127.0.0.1:9/api", Secret("admin:very-secret")) as starter:
        with pytest.raises(PrefectRefusedError) as caught:
            await starter.start("archive", "j")
    assert "secret" not in str(caught.value)
    assert "pw" not in str(caught.value)


@pytest.mark.slow
async def test_a_trigger_and_the_reconciler_start_one_run_of_prefect(prefect_server: PrefectServer) -> None:
    from flows import runs
    from flows.archive import archive_datasetlist

    assert DEPLOYMENTS == runs.DEPLOYMENTS
    with prefect_server.client_settings():
        from prefect.client.orchestration import get_client

        async with get_client() as client:
            flow_id = await client.create_flow(archive_datasetlist)
            await client.create_deployment(flow_id, "datasets_archival")
            job_id = "0f5c-trigger"
            async with PrefectStarter.open(prefect_server.url) as starter:
                first = await starter.start("archive", job_id)
                assert await starter.start("archive", job_id) == first
                run = await runs.start_run(client, "archive", job_id, 1)
                assert str(run.id) == first
                assert (run.parameters, run.name) == ({"job_id": job_id}, f"archive job {job_id}")
                assert run.state is not None
                assert run.state.type.value == "SCHEDULED"
                with pytest.raises(ConfigError, match="datasets_retrieval"):
                    await starter.start("retrieve", job_id)
            await client.delete_flow(flow_id)
