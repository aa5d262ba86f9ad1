"""Very large jobs: while one is taken, taken up or cancelled everybody else has turns, and finds nothing half done."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from mover.api import JobOrder
from mover.daemon_book import Item
from mover.daemon_events import EventHub
from mover.daemon_http_bodies import check_order
from mover.daemon_ledger import Ledger
from mover.daemon_runner import Result
from mover.daemon_store import Store
from mover.daemon_store_rows import insert_job, read_unfinished
from mover.daemon_work import Work, WorkRules
from mover.engine import Engine, EngineConfig
from mover.policies.retry import RetryPolicy
from mover.tasks import TURN, in_turns
from tests.datasets import fresh_buckets, make_config
from tests.job_services import Steered, ended, open_service, order, service_config, until
from tests.servers import S3Server
from tests.test_daemon_store import new_job

pytestmark = pytest.mark.anyio

MANY = tuple(f"20.500/{number}" for number in range(12 * TURN))


class Nothing:
    """Runs nothing."""

    async def run(self, item: Item) -> Result:
        raise NotImplementedError(item.dataset_id)


class Held(Steered):
    """Begins everything and ends nothing."""

    async def run(self, item: Item) -> Result:
        self.attempts[item.dataset_id] += 1
        await anyio.sleep_forever()
        return Result()


@pytest.fixture
def config(tmp_path: Path, moto_server: S3Server) -> Iterator[EngineConfig]:
    with fresh_buckets(moto_server) as buckets:
        yield make_config(tmp_path, moto_server, buckets)


async def turns_during(call: Callable[[], Awaitable[object]]) -> int:
    """How often another task has its turn while a call is under way."""
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await anyio.lowlevel.checkpoint()
            turns += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take_turns)
        await anyio.lowlevel.checkpoint()
        turns = 0
        await call()
        tasks.cancel_scope.cancel()
    return turns


async def test_a_long_loop_gives_others_their_turns_and_a_short_one_runs_through() -> None:
    async def count(items: int) -> None:
        assert [item async for item in in_turns(range(items))] == list(range(items))

    assert await turns_during(lambda: count(TURN)) == 0
    assert await turns_during(lambda: count(10 * TURN)) >= 8


async def test_others_have_their_turns_while_a_large_job_is_checked_put_together_queued_and_taken_up(
    tmp_path: Path,
) -> None:
    assert await turns_during(lambda: check_order(JobOrder("plan", MANY))) >= 9
    rules = WorkRules(4, RetryPolicy(), 1.0, lambda: 0.5, tuple)
    async with Store.open(tmp_path / "daemon") as store:
        await store.write(partial(insert_job, new=new_job("1", *MANY)))
        ((row, rows),) = await store.read(read_unfinished)
        ledger = Ledger(store, EventHub(), time.time)
        work = Work(ledger, rules, Nothing(), None)  # its parts, without the waiting for anything else
        assert await turns_during(lambda: ledger.add(row, rows)) >= 9
        assert await turns_during(lambda: work.queue(ledger.jobs[row.id])) >= 9
        ledger = Ledger(store, EventHub(), time.time)
        work = Work(ledger, rules, Nothing(), None)
        assert await turns_during(lambda: work.take_up(row, rows)) >= 18
        assert ledger.tally.datasets == len(MANY)
        arrivals = [item.rank.arrival for item in ledger.jobs[row.id].items.values()]
        assert arrivals == list(range(len(MANY)))


async def test_a_large_job_that_is_cancelled_as_soon_as_it_is_seen_is_cancelled_whole_and_begins_nothing_more(
    config: EngineConfig,
) -> None:
    runners: list[Held] = []

    def steer(engine: Engine) -> Held:
        runners.append(Held(engine))
        return runners[0]

    jobs = service_config(config.scratch_folder)
    async with open_service(config, jobs, steer) as service:
        other, _ = await service.submit(order("20.500/other"), owner="bob")
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: service.submit(order(*MANY, kind="plan"), owner="ann"))
                while (found := (await service.jobs(owner="ann")).jobs) == ():
                    await anyio.lowlevel.checkpoint()
                await service.cancel(found[0].id, who="bob")
            begun = dict(runners[0].attempts)
            done = await ended(service, found[0].id)
        assert {dataset.state for dataset in done.datasets} == {"cancelled"}
        assert (done.state, done.reason) == ("cancelled", "cancelled by bob")
        await until(lambda: service.statistics().running == 1)
        numbers = service.statistics()
        assert (numbers.jobs, numbers.queued, numbers.waiting) == (1, 0, 0)
        assert numbers.ended["plan", "cancelled"] == len(MANY)
        await anyio.sleep(0.2)
        assert dict(runners[0].attempts) == begun
        assert not (await service.job(other.id)).reason
    async with open_service(config, jobs, steer) as service:
        assert service.statistics().queued + service.statistics().running == 1


async def test_a_large_job_that_runs_is_cancelled_in_turns(config: EngineConfig) -> None:
    async with open_service(config, service_config(config.scratch_folder), Held) as service:
        job, _ = await service.submit(order(*MANY, kind="plan"), owner="ann")
        await until(lambda: service.statistics().running == 4)
        known = service._ledger.jobs[job.id]  # noqa: SLF001
        entered = 0
        real = service._ledger.enter  # noqa: SLF001

        def enter(*arguments: object, **more: object) -> object:
            nonlocal entered
            entered += 1
            return real(*arguments, **more)  # type: ignore[arg-type]

        service._ledger.enter = enter  # type: ignore[assignment,method-assign] # noqa: SLF001
        await service._work.cancel(known, "bob")  # noqa: SLF001
        done = await ended(service, job.id)
        assert entered >= 12
        assert {dataset.state for dataset in done.datasets} == {"cancelled"}
        changes = [item for item in done.transitions if not item.dataset_id]
        assert [item.state for item in changes if item.state == "cancelled"] == ["cancelled"]
