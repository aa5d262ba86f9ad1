"""The daemon's client against a real server: the same errors as here, and patience with a daemon that restarts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import anyio
import pytest

from mover.api import DatasetView, Failure, JobEvent, JobOptions, JobOrder, LimitsChange
from mover.api_client import DaemonAccess, DaemonClient, daemon_access
from mover.api_engine import RemoteEngine
from mover.api_problems import failure_error
from mover.engine import Engine, EngineConfig
from mover.errors import (
    ConfigError,
    DaemonAccessError,
    DaemonTransientError,
    ExitCode,
    Fault,
    MoverError,
    OrderRefusedError,
    UnknownJobError,
)
from mover.model import Progress
from mover.parts import Buckets
from mover.policies.retry import RetryPolicy
from mover.settings_rules import Secret
from tests.datasets import DATASET, make_config, random_bytes, upload
from tests.engines import expect_same_files
from tests.http_daemons import OPERATOR, READER, TOKENS, Served, client_of, serve
from tests.job_services import Steered, ended, open_service, until
from tests.servers import S3Server, fresh_bucket

pytestmark = pytest.mark.anyio

FILES = {"a": random_bytes(5_000, 1), "b/c": random_bytes(70_000, 2)}
ORDER = JobOrder("archive", (DATASET,))


@pytest.fixture(scope="module")
def buckets(moto_server: S3Server) -> Iterator[Buckets]:
    with fresh_bucket(moto_server) as one, fresh_bucket(moto_server) as two, fresh_bucket(moto_server) as three:
        upload(moto_server, one, FILES)
        yield Buckets(one, two, three)


@pytest.fixture
def config(tmp_path: Path, moto_server: S3Server, buckets: Buckets) -> EngineConfig:
    return make_config(tmp_path, moto_server, buckets)


async def test_an_engine_elsewhere_does_what_the_engine_does(config: EngineConfig) -> None:
    told: list[Progress] = []
    gate = anyio.Event()

    def hold(engine: Engine) -> Steered:
        steered = Steered(engine)
        steered.gate = gate
        return steered

    async def let_go_once_followed(served: Served) -> None:
        await until(lambda: len(served.app.streams) > 0)
        gate.set()

    async with open_service(config, steer=hold) as service, serve(service) as served, client_of(served) as client:
        engine = RemoteEngine(client, run="r1", tell=told.append)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(let_go_once_followed, served)
            archived = await engine.archive(DATASET)
        last = told[-1]  # of work that takes less time than there is between two looks at it
        plan = await engine.plan(DATASET)
        verified = await engine.verify(DATASET)
        retrieved = await engine.retrieve(DATASET, form="files")
        again = await engine.archive(DATASET)
        assert again == archived  # the same call of the same run is the same job
        await RemoteEngine(client, run="r2").archive(DATASET)
        kinds = [job.kind async for job in client.jobs()]
        with pytest.raises(MoverError) as caught:
            await engine.archive("no/such")
    assert kinds == ["archive", "retrieve", "verify", "plan", "archive"]
    assert (plan.file_count, len(plan.datablocks), len(plan.datablocks[0].members)) == (2, 1, 2)
    assert (archived.file_count, verified.datablocks[0].digest) == (2, archived.datablocks[0].digest)
    assert len(retrieved.objects) == 2
    assert last.dataset_id == DATASET
    assert last.work_done_bytes == last.work_total_bytes == 2 * plan.size_bytes  # moved and read back
    expect_same_files(config.lts_root, FILES)
    assert (type(caught.value).__name__, caught.value.exit_code) == ("DatasetNotFoundError", ExitCode.USER)
    assert (caught.value.fault, caught.value.retryable) == (Fault.USER, False)


@pytest.mark.slow
async def test_a_call_after_a_failure_orders_a_new_job_and_one_that_is_cancelled_cancels_its_own(
    config: EngineConfig,
) -> None:
    def fail(_item: object, attempt: int) -> Exception | None:
        return KeyError("a defect") if attempt == 1 else None

    def steer(engine: Engine) -> Steered:
        return Steered(engine, fail)

    async with open_service(config, steer=steer) as service, serve(service) as served, client_of(served) as client:
        engine = RemoteEngine(client, run="r1")
        with pytest.raises(MoverError):
            await engine.archive(DATASET)
        await engine.archive(DATASET)
        states = [job.state async for job in client.jobs()]
    assert states == ["done", "failed"]

    def hold(engine: Engine) -> Steered:
        steered = Steered(engine)
        steered.gate = anyio.Event()
        return steered

    async def give_up(served: Served, scope: anyio.CancelScope) -> None:
        await until(lambda: len(served.app.streams) > 0)
        scope.cancel()

    async with open_service(config, steer=hold) as service, serve(service) as served, client_of(served) as client:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(give_up, served, scope)
                await RemoteEngine(client, run="r3").verify(DATASET)
        with anyio.move_on_after(0):  # before the answer to the order
            await RemoteEngine(client, run="r4").retrieve(DATASET)
        newest = [await ended(service, job.id) async for job in client.jobs(limit=2)]
    assert [(job.kind, job.state) for job in newest] == [("retrieve", "cancelled"), ("verify", "cancelled")]


@pytest.mark.slow
async def test_a_job_is_followed_over_a_restart_of_the_daemon_and_every_event_told_once(config: EngineConfig) -> None:
    def hold(engine: Engine) -> Steered:
        steered = Steered(engine)
        steered.gate = anyio.Event()
        return steered

    events: list[JobEvent] = []
    pauses: list[MoverError] = []
    port = 0
    restarted = anyio.Event()

    async def follow(client: DaemonClient, job_id: str) -> None:
        async with aclosing(client.follow(job_id, on_pause=pauses.append)) as stream:
            async for event in stream:
                events.append(event)
                if event.transition is not None and event.transition.state == "running":
                    restarted.set()

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            async with open_service(config, steer=hold) as service, serve(service) as served:
                port = served.port
                async with client_of(served) as client:
                    job = await client.submit(ORDER)
                access = DaemonAccess(served.url)
                opened = DaemonClient.open(access, retry=RetryPolicy(attempts=5000, base_s=0.05, cap_s=0.1))
                client = await opened.__aenter__()
                tasks.start_soon(follow, client, job.id)
                await restarted.wait()
            async with open_service(config) as service, serve(service, port=port):
                await ended(service, job.id)
                done = await client.job(job.id)
                with anyio.fail_after(30):
                    while not events or events[-1].type != "end":  # noqa: ASYNC110 - it looks from outside
                        await anyio.sleep(0.01)
            await opened.__aexit__(None, None, None)
    assert pauses
    assert done.state == "done"
    told = [event.transition for event in events if event.type != "progress" and event.transition]
    assert told == list(done.transitions)
    numbers = [event.number for event in events]
    assert numbers == sorted(set(numbers))
    expect_same_files(config.lts_root, FILES)


async def test_refusals_are_the_movers_errors_with_its_exit_codes(config: EngineConfig) -> None:
    async with open_service(config) as service, serve(service, TOKENS) as served:
        async with client_of(served, OPERATOR) as client:
            with pytest.raises(UnknownJobError):
                await client.job("none")
            with pytest.raises(UnknownJobError):
                _ = [event async for event in client.follow("none")]
            with pytest.raises(OrderRefusedError, match="segment") as caught:
                await client.submit(JobOrder("archive", ("../x",)))
            assert caught.value.exit_code == ExitCode.USAGE
            await client.submit(ORDER, key="k")
            with pytest.raises(MoverError, match="another order") as conflict:
                await client.submit(JobOrder("verify", (DATASET,)), key="k")
            assert conflict.value.exit_code == ExitCode.USER
            limits = await client.set_limits(LimitsChange(MOVE_TO_LTS_LIMIT=7))
            assert {limit.name: limit.slots for limit in limits}["MOVE_TO_LTS_LIMIT"] == 7
            assert {limit.name: limit.slots for limit in await client.limits()}["MOVE_TO_LTS_LIMIT"] == 7
        async with client_of(served, READER) as client:
            with pytest.raises(DaemonAccessError, match="may read") as denied:
                await client.submit(ORDER)
            assert READER not in str(denied.value)
        async with client_of(served) as client:
            with pytest.raises(DaemonAccessError, match="token"):
                await client.limits()
    with pytest.raises(DaemonTransientError, match="ConnectError"):
        async with DaemonClient.open(DaemonAccess(served.url), retry=RetryPolicy(attempts=2, base_s=0.01)) as client:
            await client.limits()


@pytest.mark.slow
async def test_a_full_queue_is_waited_for(config: EngineConfig) -> None:
    gate = anyio.Event()

    def hold(engine: Engine) -> Steered:
        steered = Steered(engine)
        steered.gate = gate
        return steered

    from tests.job_services import service_config

    jobs = service_config(config.scratch_folder, jobs_limit=1)
    async with open_service(config, jobs, hold) as service, serve(service) as served, client_of(served) as client:
        first = await client.submit(ORDER)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.submit, JobOrder("verify", (DATASET,), JobOptions()))
            await anyio.sleep(0.2)
            gate.set()
            await ended(service, first.id)
        assert [job.kind async for job in client.jobs()] == ["verify", "archive"]


def test_addresses_that_are_none_are_refused_without_showing_a_password(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(f"eye:read:{READER}\nme:operate:{OPERATOR}\n")
    path.chmod(0o600)
    assert daemon_access("http://host:8420/", path) == DaemonAccess("http://host:8420", Secret(OPERATOR))
    assert daemon_access("unix:/run/mover.sock").url == "unix:/run/mover.sock"
    assert OPERATOR not in repr(daemon_access("https://host", path))
    for url in (
        "host:8420",
        "ftp://host",
        "http://",
        "unix:",
        "http://me:secret@host",
        "http://host/v1",
        "http://h?x=1",
    ):
        with pytest.raises(ConfigError) as caught:
            daemon_access(url)
        assert "secret" not in str(caught.value)


def test_a_failure_of_the_daemon_is_told_under_its_own_name() -> None:
    told = Failure("NotEnoughSpaceError", "it is full", 5, retryable=False, fault="system")
    error = failure_error(DatasetView("a", "failed", failure=told))
    assert (type(error).__name__, str(error), error.exit_code) == ("NotEnoughSpaceError", "it is full", 5)
    cancelled = failure_error(DatasetView("a", "cancelled", reason="cancelled by ann"))
    assert (str(cancelled), cancelled.exit_code) == ("cancelled by ann", ExitCode.INTERRUPTED)
