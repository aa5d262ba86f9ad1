"""What the next job service makes of a journal that was left in the middle of things."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import anyio
import pytest

from mover.daemon_book import Item, Job, Tally, Update
from mover.daemon_runner import Result
from mover.daemon_store import Store
from mover.daemon_store_rows import insert_job, read_unfinished, request_cancel, write_changes
from mover.engine import Engine, EngineConfig
from mover.errors import LtsError
from mover.policies.retry import RetryPolicy
from tests.datasets import fresh_buckets, make_config
from tests.job_services import Steered, ended, open_service, order, service_config, until
from tests.servers import S3Server
from tests.test_daemon_store import new_job

pytestmark = pytest.mark.anyio


class Idle(Steered):
    """Does nothing, successfully, unless it is told to fail."""

    async def run(self, item: Item) -> Result:
        self.attempts[item.dataset_id] += 1
        error = self._fail(item, self.attempts[item.dataset_id])
        if error is not None:
            raise error
        return Result()


@pytest.fixture
def config(tmp_path: Path, moto_server: S3Server) -> Iterator[EngineConfig]:
    with fresh_buckets(moto_server) as buckets:
        yield make_config(tmp_path, moto_server, buckets)


async def test_a_job_that_somebody_ended_before_a_kill_does_not_go_on(config: EngineConfig) -> None:
    jobs = service_config(config.scratch_folder)
    job_id = "01900000-0000-7000-8000-000000000001"
    async with Store.open(jobs.folder) as store:
        await store.write(partial(insert_job, new=new_job(job_id, "d/1", "d/2", "d/3")))
        row, items = (await store.read(read_unfinished))[0]
        job = Job(row, items, 0, Tally(), open_end=False)
        for position, state in ((0, "done"), (1, "running")):
            changes = job.change([Update(job.items[position], {"state": state, "attempt": 1})], 2_000)
            await store.write(partial(write_changes, changes=changes))
        await store.write(partial(request_cancel, job_id=job_id, who="ann"))
    runners: list[Idle] = []

    def steer(engine: Engine) -> Idle:
        runners.append(Idle(engine))
        return runners[-1]

    async with open_service(config, jobs, steer) as service:
        view = await ended(service, job_id)
    assert (view.state, view.reason) == ("cancelled", "cancelled by ann")
    assert [dataset.state for dataset in view.datasets] == ["done", "cancelled", "cancelled"]
    assert not runners[0].attempts


async def test_the_time_of_the_next_try_and_the_tries_outlive_a_restart(config: EngineConfig) -> None:
    later = RetryPolicy(attempts=3, base_s=3_600.0, cap_s=3_600.0)
    jobs = service_config(config.scratch_folder, retry=later)
    runners: list[Idle] = []

    def steer(engine: Engine) -> Idle:
        runners.append(Idle(engine, lambda _item, _attempt: LtsError("open", "/lts", "away")))
        return runners[-1]

    async with open_service(config, jobs, steer) as service:
        job, _ = await service.submit(order("d/1"), owner="ann")
        with anyio.fail_after(30):
            while (view := await service.job(job.id)).state != "waiting":  # noqa: ASYNC110 - it is the journal that knows
                await anyio.sleep(0.01)
        before = view.datasets[0]
        assert before.retry_at
    async with open_service(config, jobs, steer) as service:
        assert (await service.job(job.id)).datasets[0] == before
        other, _ = await service.submit(order("d/2"), owner="ann")
        await until(lambda: service.statistics().waiting == 2)
        await service.cancel(other.id, who="ann")
    assert [dict(runner.attempts) for runner in runners] == [{"d/1": 1}, {"d/2": 1}]


async def test_events_go_on_over_a_restart_without_a_gap_or_a_repetition(config: EngineConfig) -> None:
    jobs = service_config(config.scratch_folder)
    gate = anyio.Event()

    def held(engine: Engine) -> Steered:
        steered = Steered(engine)
        steered.gate = gate
        return steered

    seen = []
    async with open_service(config, jobs, held) as service:
        job, _ = await service.submit(order("d/1", "d/2"), owner="ann")
        async for event in service.events(job.id):
            seen.append(event)
            if event.type == "progress":
                break
    async with open_service(config, jobs, Idle) as service:
        await ended(service, job.id)
        seen += [event async for event in service.events(job.id, seen[-1].number)]
        changes = (await service.job(job.id)).transitions
    numbers = [event.number for event in seen]
    assert numbers == sorted(set(numbers))
    assert [event.transition for event in seen if event.transition is not None] == list(changes)
    assert seen[-1].type == "end"


async def test_the_queue_is_as_old_as_its_oldest_job_of_which_nothing_was_begun(config: EngineConfig) -> None:
    def hold(engine: Engine) -> Steered:
        steered = Steered(engine)
        steered.gate = anyio.Event()
        return steered

    jobs = service_config(config.scratch_folder, datasets_at_a_time=1)
    async with open_service(config, jobs, hold) as service:
        await service.submit(order("d/1", "d/2", "d/3"), owner="ann")
        await until(lambda: service.statistics().running == 1)
        await anyio.sleep(0.1)
        assert (service.statistics().queued, service.statistics().oldest_age_s) == (2, 0)
        waits, _ = await service.submit(order("d/4"), owner="ann")
        await until(lambda: service.statistics().oldest_age_s > 0.1)
    async with open_service(config, jobs, hold) as service:
        await until(lambda: service.statistics().oldest_age_s > 0.1)
        await service.cancel(waits.id, who="ann")
        await ended(service, waits.id)
        assert service.statistics().oldest_age_s == 0
