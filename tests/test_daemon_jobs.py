"""The daemon's jobs on a real engine: states, retries, cancellation, one dataset at a time, and what survives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.lowlevel
import msgspec
import pytest

from mover.api import JobOrder, LimitsChange
from mover.daemon_book import Item
from mover.daemon_jobs import JobService
from mover.daemon_runner import Result
from mover.engine import Engine, EngineConfig
from mover.errors import (
    ConfigError,
    DatasetBusyError,
    IntakeClosedError,
    JournalError,
    KeyConflictError,
    LtsError,
    QueueFullError,
    UnknownJobError,
)
from mover.parts import Buckets
from tests.datasets import DATASET, make_config, open_engine, random_bytes, upload
from tests.engines import expect_same_files
from tests.job_services import Steered, collect, ended, open_service, order, service_config, until
from tests.servers import S3Server, fresh_bucket

pytestmark = pytest.mark.anyio

FILES = {"a": random_bytes(5_000, 1), "b/c": random_bytes(70_000, 2)}
OTHERS = [f"20.500.11935/other-{number}" for number in range(6)]


@pytest.fixture(scope="module")
def buckets(moto_server: S3Server) -> Iterator[Buckets]:
    """Only read, but for what is retrieved of one dataset."""
    with fresh_bucket(moto_server) as one, fresh_bucket(moto_server) as two, fresh_bucket(moto_server) as three:
        for dataset_id in (DATASET, *OTHERS):
            upload(moto_server, one, FILES, dataset_id)
        yield Buckets(one, two, three)


@pytest.fixture
def config(tmp_path: Path, moto_server: S3Server, buckets: Buckets) -> EngineConfig:
    return make_config(tmp_path, moto_server, buckets)


async def test_all_four_kinds_run_and_leave_the_engines_report(config: EngineConfig) -> None:
    async with open_service(config) as service:
        for kind, part in (("plan", "datablocks"), ("archive", "datablocks"), ("verify", "datablocks")):
            job, new = await service.submit(JobOrder(kind, (DATASET,)), owner="ann")  # type: ignore[arg-type]
            assert new
            assert (job.state, job.owner) == ("queued", "ann")
            done = await ended(service, job.id)
            assert (done.state, done.datasets[0].state, done.datasets[0].attempt) == ("done", "done", 1)
            report = done.datasets[0].report
            assert report is not None
            assert len(report[part]) == 1
        job, _ = await service.submit(order(DATASET, kind="retrieve", form="files"), owner="ann")
        report = (await ended(service, job.id)).datasets[0].report
        assert report is not None
        assert {item["key"].rpartition("raw_files/")[2] for item in report["objects"]} == set(FILES)
        assert all(item["url"].startswith("http") for item in report["objects"])
        statistics = service.statistics()
    expect_same_files(config.lts_root, FILES)
    assert statistics.ended == {(kind, "done"): 1 for kind in ("plan", "archive", "verify", "retrieve")}
    assert (statistics.jobs, statistics.queued, statistics.running, statistics.owners) == (0, 0, 0, ())


async def test_events_tell_every_change_with_growing_numbers_and_can_be_resumed_anywhere(config: EngineConfig) -> None:
    async with open_service(config) as service:
        job, _ = await service.submit(order(DATASET), owner="ann")
        live = await collect(service, job.id)
        kept = await collect(service, job.id)
        numbers = [event.number for event in live]
        assert numbers == sorted(set(numbers))
        changes = [event for event in live if event.type != "progress"]
        assert changes == kept
        assert [(event.transition.dataset_id, event.transition.state) for event in kept if event.transition] == [
            ("", "queued"),
            (DATASET, "running"),
            ("", "running"),
            (DATASET, "done"),
            ("", "done"),
        ]
        assert (live[-1].type, live[-1].state) == ("end", "done")
        for index, event in enumerate(kept):
            assert await collect(service, job.id, event.number) == kept[index + 1 :]
        view = await service.job(job.id)
        assert view.transitions == tuple(event.transition for event in kept if event.transition)
        assert all(at.endswith("Z") for at in (view.accepted_at, view.changed_at, view.transitions[0].at))
        with pytest.raises(UnknownJobError):
            await collect(service, "no such job")


@pytest.mark.slow
async def test_a_reader_that_comes_late_is_told_how_work_stands_and_a_slow_one_holds_nothing_up(
    config: EngineConfig,
) -> None:
    gate = anyio.Event()

    def steer(engine: Engine) -> Steered:
        steered = Steered(engine)
        steered.gate = gate
        return steered

    async with open_service(config, steer=steer) as service:
        job, _ = await service.submit(order(DATASET, *OTHERS), owner="ann")
        slow = service.events(job.id)
        assert (await anext(aiter(slow))).state == "queued"
        await until(lambda: service.statistics().running == 4)
        async for event in service.events(job.id):
            if event.type == "progress":
                assert event.dataset is not None
                assert event.dataset.state == "running"
                break
        gate.set()
        await ended(service, job.id)
        missed = [event async for event in slow]
        assert missed[-1].type == "end"
        assert sum(event.type == "state" for event in missed) == len((await service.job(job.id)).transitions) - 1


async def test_a_failure_that_passes_is_tried_again_at_a_time_that_is_told(config: EngineConfig) -> None:
    def fail(_item: Item, attempt: int) -> Exception | None:
        return LtsError("open", "/lts", "away") if attempt < 3 else None

    async with open_service(config, steer=lambda engine: Steered(engine, fail)) as service:
        job, _ = await service.submit(order(DATASET), owner="ann")
        done = await ended(service, job.id)
        assert (done.state, done.datasets[0].attempt) == ("done", 3)
        waits = [item for item in done.transitions if item.state == "waiting" and item.dataset_id]
        assert [item.reason for item in waits] == ["open /lts: away"] * 2
        assert service.statistics().retries == {"LtsError": 2}


async def test_a_failure_that_stays_is_the_datasets_and_no_other_ones(config: EngineConfig) -> None:
    def fail(item: Item, _attempt: int) -> Exception | None:
        return {OTHERS[0]: LtsError("open", "/lts", "away"), OTHERS[1]: KeyError("a defect")}.get(item.dataset_id)

    async with open_service(config, steer=lambda engine: Steered(engine, fail)) as service:
        job, _ = await service.submit(order(DATASET, OTHERS[0], OTHERS[1], "no/such"), owner="ann")
        done = await ended(service, job.id)
    assert done.state == "failed"
    assert [dataset.state for dataset in done.datasets] == ["done", "failed", "failed", "failed"]
    failures = [dataset.failure for dataset in done.datasets]
    assert failures[1] is not None
    assert (failures[1].kind, failures[1].exit_code, done.datasets[1].attempt) == ("LtsError", 1, 3)
    assert failures[2] is not None
    assert (failures[2].kind, done.datasets[2].attempt) == ("KeyError", 1)
    assert failures[3] is not None
    assert (failures[3].fault, failures[3].exit_code) == ("user", 3)


async def test_a_dataset_is_in_work_once_and_the_others_say_whom_they_wait_for(config: EngineConfig) -> None:
    steered: list[Steered] = []

    def steer(engine: Engine) -> Steered:
        steered.append(Steered(engine))
        steered[0].gate = anyio.Event()
        return steered[0]

    async with open_service(config, steer=steer) as service:
        jobs = [
            (await service.submit(order(DATASET), owner="a"))[0],
            (await service.submit(order(DATASET), owner="b"))[0],
            (await service.submit(order(DATASET, kind="verify"), owner="c"))[0],
        ]
        await until(lambda: service.statistics().waiting == 2)
        waiting = await service.job(jobs[1].id)
        assert (waiting.state, waiting.reason) == ("waiting", f"job {jobs[0].id} works on the same dataset")
        assert steered[0].gate is not None
        steered[0].gate.set()
        assert [(await ended(service, job.id)).state for job in jobs] == ["done"] * 3
    assert steered[0].attempts == {DATASET: 3}


async def test_a_dataset_held_elsewhere_is_waited_for_and_its_holder_named(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mover.daemon_runner._SHORTEST_BUSY_S", 0.05)
    async with open_engine(config) as other, open_service(config) as service:
        async with other.holding(DATASET):
            job, _ = await service.submit(order(DATASET), owner="ann")
            await until(lambda: service.statistics().retries.get("DatasetBusyError", 0) >= 2)
            while (view := await service.job(job.id)).state != "waiting":  # it tries again, and runs while it does
                pass
            assert view.reason.startswith("in use by ")
            assert view.datasets[0].retry_at
        done = await ended(service, job.id)
    assert done.state == "done"
    assert done.datasets[0].attempt >= 3  # more often than failures are tried again


async def test_a_dataset_held_for_longer_than_anybody_waits_fails(config: EngineConfig) -> None:
    patience = service_config(config.scratch_folder, busy_patience_s=0.0)
    async with open_engine(config) as other, other.holding(DATASET), open_service(config, patience) as service:
        job, _ = await service.submit(order(DATASET), owner="ann")
        failure = (await ended(service, job.id)).datasets[0].failure
    assert failure is not None
    assert failure.kind == DatasetBusyError.__name__


async def test_cancelling_ends_what_runs_and_what_waits_at_once_and_twice_is_once(config: EngineConfig) -> None:
    def steer(engine: Engine) -> Steered:
        steered = Steered(engine)
        steered.gate = anyio.Event()
        return steered

    async with open_service(config, steer=steer) as service:
        job, _ = await service.submit(order(DATASET, *OTHERS), owner="ann")
        await until(lambda: service.statistics().running == 4)
        await service.cancel(job.id, who="bob")
        done = await ended(service, job.id)
        assert (done.state, done.reason) == ("cancelled", "cancelled by bob")
        assert {dataset.state for dataset in done.datasets} == {"cancelled"}
        assert await service.cancel(job.id, who="carol") == done
        assert service.statistics().running == 0
        with pytest.raises(UnknownJobError):
            await service.cancel("unknown", who="bob")


async def test_what_fails_while_its_job_is_being_cancelled_is_not_tried_again(config: EngineConfig) -> None:
    cancelling = anyio.Event()

    class Failing(Steered):
        async def run(self, item: Item) -> Result:
            self.attempts[item.dataset_id] += 1
            cancelling.set()
            for _ in range(3):  # the cancellation is on its way into the journal, before the end of this attempt
                await anyio.lowlevel.checkpoint()
            raise LtsError("open", "/lts", "away")

    runners: list[Failing] = []

    def steer(engine: Engine) -> Failing:
        runners.append(Failing(engine))
        return runners[-1]

    async with open_service(config, steer=steer) as service:
        job, _ = await service.submit(order(DATASET), owner="ann")
        await cancelling.wait()
        await service.cancel(job.id, who="bob")
        done = await ended(service, job.id)
        assert (done.state, done.datasets[0].state, done.datasets[0].retry_at) == ("cancelled", "cancelled", "")
        assert runners[0].attempts[DATASET] == 1
        assert service.statistics().jobs == 0


async def test_a_key_gives_the_same_job_and_refuses_another_order(config: EngineConfig) -> None:
    async with open_service(config) as service:
        first, new = await service.submit(order(DATASET), owner="ann", key="k")
        again, new_again = await service.submit(order(DATASET), owner="ann", key="k")
        assert (new, new_again, again.id) == (True, False, first.id)
        other, new = await service.submit(order(DATASET), owner="bob", key="k")
        assert new
        assert other.id != first.id
        with pytest.raises(KeyConflictError, match=first.id):
            await service.submit(order(OTHERS[0]), owner="ann", key="k")
    async with open_service(config) as service:
        again, new = await service.submit(order(DATASET), owner="ann", key="k")
        assert (again.id, new) == (first.id, False)


async def test_a_full_queue_refuses_with_a_time_and_still_knows_its_keys(config: EngineConfig) -> None:
    def steer(engine: Engine) -> Steered:
        steered = Steered(engine)
        steered.gate = anyio.Event()
        return steered

    bounded = service_config(config.scratch_folder, jobs_limit=2, datasets_limit=3)
    async with open_service(config, bounded, steer) as service:
        job, _ = await service.submit(order(DATASET), owner="ann", key="k")
        for too_long in (order(*OTHERS[:3]), order(OTHERS[0], kind="retrieve", files=("a" * 1024,))):
            with pytest.raises(QueueFullError, match="3 datasets and files"):
                await service.submit(too_long, owner="ann")
        await service.submit(order(OTHERS[0]), owner="ann")
        with pytest.raises(QueueFullError, match="2 jobs") as full:
            await service.submit(order(OTHERS[1]), owner="ann")
        assert 1 <= full.value.retry_after_s <= 600
        assert (await service.submit(order(DATASET), owner="ann", key="k"))[0].id == job.id
        await service.cancel(job.id, who="ann")
        await ended(service, job.id)
        await service.submit(order(OTHERS[1]), owner="ann")


async def test_a_burst_beyond_the_limit_is_accepted_up_to_it(config: EngineConfig) -> None:
    refused = 0

    def hold(engine: Engine) -> Steered:
        steered = Steered(engine)
        steered.gate = anyio.Event()
        return steered

    limited = service_config(config.scratch_folder, jobs_limit=20)
    async with open_service(config, limited, hold) as service:

        async def one(number: int) -> None:
            nonlocal refused
            try:
                await service.submit(order(f"p/{number}", kind="plan"), owner="ann")
            except QueueFullError:
                refused += 1

        async with anyio.create_task_group() as tasks:
            for number in range(50):
                tasks.start_soon(one, number)
        assert refused == 30
        assert service.statistics().accepted == 20


@pytest.mark.slow
async def test_draining_lets_work_end_or_stops_it_and_the_next_start_goes_on(config: EngineConfig) -> None:
    steered: list[Steered] = []

    def steer(engine: Engine) -> Steered:
        steered.append(Steered(engine))
        if len(steered) == 1:
            steered[0].gate = anyio.Event()
        return steered[-1]

    async with open_service(config, steer=steer) as service:
        job, _ = await service.submit(order(DATASET, *OTHERS), owner="ann")
        await until(lambda: service.statistics().running == 4)
        await service.drain(0.1)
        with pytest.raises(IntakeClosedError):
            await service.submit(order(DATASET), owner="ann")
        stopped = await service.job(job.id)
        assert [dataset.state for dataset in stopped.datasets] == ["queued"] * 7
        assert "goes on" in stopped.datasets[0].reason
    async with open_service(config, steer=steer) as service:
        assert (await ended(service, job.id)).state == "done"
        assert steered[1].order[:4] == steered[0].order[:4]  # what was begun goes first


async def test_draining_waits_for_work_that_ends_in_time(config: EngineConfig) -> None:
    async with open_service(config) as service:
        job, _ = await service.submit(order(DATASET), owner="ann")
        await until(lambda: service.statistics().running == 1)
        await service.drain(20.0)
        assert (await service.job(job.id)).state == "done"


async def test_what_is_done_is_not_run_again_by_the_next_service(config: EngineConfig) -> None:
    steered: list[Steered] = []

    def steer(engine: Engine) -> Steered:
        steered.append(Steered(engine, lambda item, _: LtsError("x", "y", "z") if item.dataset_id in OTHERS else None))
        return steered[-1]

    async with open_service(config, steer=steer) as service:
        job, _ = await service.submit(order(DATASET), owner="ann")
        await ended(service, job.id)
        bad, _ = await service.submit(order(OTHERS[0]), owner="ann")
        await ended(service, bad.id)
    async with open_service(config, steer=steer) as service:
        assert (await service.job(job.id)).state == "done"
        assert service.statistics().jobs == 0
        third, _ = await service.submit(order(OTHERS[2], kind="plan"), owner="ann")
        await ended(service, third.id)
    assert set(steered[1].attempts) == {OTHERS[2]}


@pytest.mark.slow
async def test_owners_share_and_priorities_count_within_an_owner(config: EngineConfig) -> None:
    steered: list[Steered] = []

    def steer(engine: Engine) -> Steered:
        steered.append(Steered(engine))
        steered[0].gate = anyio.Event()
        return steered[0]

    one_at_a_time = service_config(config.scratch_folder, datasets_at_a_time=1)
    async with open_service(config, one_at_a_time, steer) as service:
        await service.submit(order(DATASET), owner="first")
        await until(lambda: service.statistics().running == 1)
        jobs = [(await service.submit(order(*OTHERS[:3]), owner="many"))[0]]
        jobs.append((await service.submit(order(OTHERS[3]), owner="few"))[0])
        jobs.append((await service.submit(order(OTHERS[4], priority=5), owner="many"))[0])
        assert steered[0].gate is not None
        steered[0].gate.set()
        for job in jobs:
            await ended(service, job.id)
    assert OTHERS[3] in steered[0].order[1:3]
    assert steered[0].order.index(OTHERS[4]) < steered[0].order.index(OTHERS[0])
    assert all(len(group) == 1 for group in steered[0].together)


async def test_jobs_are_listed_by_page_newest_first_and_by_what_they_are(config: EngineConfig) -> None:
    async with open_service(config) as service:
        ids = [
            (await service.submit(order(f"no/such-{n % 3}", kind="plan"), owner="ab"[n % 2]))[0].id for n in range(9)
        ]
        for job_id in ids:
            await ended(service, job_id)
        found, before = list[str](), ""
        while True:
            page = await service.jobs(before=before, limit=4)
            assert not any(job.transitions or job.datasets[0].report for job in page.jobs)
            found += [job.id for job in page.jobs]
            before = page.next
            if not before:
                break
        assert found == ids[::-1]
        assert [job.id for job in (await service.jobs(owner="a", state="failed")).jobs] == ids[::-1][::2]
        assert (await service.jobs(owner="a", state="done")).jobs == ()
        assert [job.id for job in (await service.jobs(dataset_id="no/such-1", limit=2)).jobs] == [ids[7], ids[4]]


async def test_limits_change_while_work_goes_on_all_or_none(config: EngineConfig) -> None:
    async with open_service(config) as service:
        assert [limit.slots for limit in service.limits()] == [1, 2, 1, 1]
        changed = await service.set_limits(LimitsChange(MOVE_TO_LTS_LIMIT=5, VERIFY_LTS_LIMIT=3))
        assert [limit.slots for limit in changed] == [1, 5, 3, 1]
        with pytest.raises(ConfigError):
            service._engine.set_limits({"MOVE_TO_LTS_LIMIT": 1, "NO_LIMIT": 2})  # noqa: SLF001 - names come typed
        assert [limit.slots for limit in service.limits()] == [1, 5, 3, 1]


async def test_a_job_of_the_catalogue_needs_one(config: EngineConfig) -> None:
    async with open_service(config) as service:
        with pytest.raises(ConfigError, match="SCICAT_ENDPOINT"):
            await service.submit(order(DATASET), owner="ann", catalogue_job="j")


async def test_a_journal_that_refuses_accepts_nothing_and_work_that_is_done_is_kept_once_it_takes_it(
    config: EngineConfig,
) -> None:
    gate = anyio.Event()

    def steer(engine: Engine) -> Steered:
        steered = Steered(engine)
        steered.gate = gate
        return steered

    async with open_service(config, steer=steer) as service:
        job, _ = await service.submit(order(DATASET), owner="ann")
        await until(lambda: service.statistics().running == 1)
        store = service._store  # noqa: SLF001 - the fault is put beneath it
        pages = store._writer.execute("PRAGMA page_count").fetchone()[0]  # noqa: SLF001
        store._writer.execute(f"PRAGMA max_page_count = {pages}")  # noqa: SLF001 - as on a full disk
        await _expect_full(service)
        gate.set()
        await until(lambda: service.statistics().journal_error != "", 10)
        assert (await service.job(job.id)).state == "running"
        store._writer.execute("PRAGMA max_page_count = 1000000")  # noqa: SLF001
        assert (await ended(service, job.id)).state == "done"
        assert service.statistics().journal_error == ""


async def _expect_full(service: JobService) -> None:
    jobs_before = service.statistics().jobs
    with pytest.raises(JournalError, match=r"jobs\.sqlite: SQLITE_FULL: database or disk is full"):
        await service.submit(order(*(f"x/{number}" for number in range(5_000))), owner="ann")
    assert service.statistics().jobs == jobs_before
    assert [job.state for job in (await service.jobs()).jobs] == ["running"]


async def test_what_waits_for_a_slot_says_for_which_and_who_has_it(config: EngineConfig) -> None:
    async with open_service(config) as service:
        limits = service._engine._parts.limits  # noqa: SLF001 - held as another dataset's datablock would
        async with limits.move_to_lts.slot("x_1.tar"), limits.move_to_lts.slot("y_1.tar"):
            job, _ = await service.submit(order(DATASET), owner="ann")
            reason = "a slot of MOVE_TO_LTS_LIMIT (held by x_1.tar, y_1.tar)"
            with anyio.fail_after(20):  # a wait counts as one after a second
                while (view := await service.job(job.id)).state != "waiting" or view.datasets[0].reason != reason:  # noqa: ASYNC110 - it looks from outside
                    await anyio.sleep(0.05)
            assert view.datasets[0].state == "waiting"
        done = await ended(service, job.id)
        told = [item.state for item in done.transitions if item.dataset_id]
        assert (told[:2], told[-1]) == (["running", "waiting"], "done")


@pytest.mark.slow
async def test_what_waits_for_space_says_so_holds_up_no_other_kind_and_can_be_cancelled(config: EngineConfig) -> None:
    async with open_service(config) as service:
        job, _ = await service.submit(order(DATASET), owner="ann")
        await ended(service, job.id)
    async with open_engine(config) as engine:
        space = await engine.space()
    floor_bytes = (space.free_bytes + space.total_bytes) / 2
    full = msgspec.structs.replace(config, free_space_percentage=100 * floor_bytes / space.total_bytes)
    async with open_service(full) as service:
        job, _ = await service.submit(order(*OTHERS), owner="ann")
        await until(lambda: service.statistics().waiting == 4)
        view = await service.job(job.id)
        reasons = {dataset.reason for dataset in view.datasets if dataset.state == "waiting"}
        assert any(reason.startswith("the LTS lacks") for reason in reasons), reasons
        assert any(reason.startswith("a slot of LTS_FREE_LIMIT") for reason in reasons), reasons
        other, _ = await service.submit(order(DATASET, kind="verify"), owner="ann")
        assert (await ended(service, other.id)).state == "done"
        await service.cancel(job.id, who="bob")
        assert (await ended(service, job.id)).state == "cancelled"
