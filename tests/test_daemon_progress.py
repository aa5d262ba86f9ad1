"""How often the daemon tells how work stands and what it waits for, whatever its engine tells."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from mover.api import JobEvent
from mover.daemon_events import ProgressRelay
from mover.daemon_jobs import JobService
from mover.daemon_waits import is_same_wait
from mover.engine import Engine, EngineConfig
from mover.model import Progress, Stage
from tests.datasets import DATASET, fresh_buckets, make_config, upload
from tests.job_services import Steered, ended, order, service_config, until
from tests.servers import S3Server

pytestmark = pytest.mark.anyio


@pytest.fixture
def config(tmp_path: Path, moto_server: S3Server) -> Iterator[EngineConfig]:
    with fresh_buckets(moto_server) as buckets:
        upload(moto_server, buckets.landing_zone, {"a": b"a file"})
        yield make_config(tmp_path, moto_server, buckets)


@asynccontextmanager
async def steered_service(config: EngineConfig, relay: ProgressRelay) -> AsyncIterator[tuple[JobService, Steered]]:
    async with Engine.open(config, tell=relay.tell) as engine:
        steered = Steered(engine)
        steered.gate = anyio.Event()
        jobs = service_config(config.scratch_folder)
        async with JobService.open(engine, jobs, progress=relay, runner=steered) as service:
            yield service, steered


class _Waits:
    """Tells as the engine would what a dataset waits for, and looks at what is kept of it."""

    def __init__(self, service: JobService, relay: ProgressRelay, job_id: str) -> None:
        self._service, self._relay, self._job_id = service, relay, job_id

    async def kept(self) -> list[tuple[str, str]]:
        transitions = (await self._service.job(self._job_id)).transitions
        return [(item.state, item.reason) for item in transitions if item.dataset_id]

    async def tell(self, reason: str, *, expect: bool = True) -> None:
        state = "waiting" if reason else "started"
        self._relay.tell(Progress(DATASET, Stage.SPACE, state, 1, reason=reason))  # type: ignore[arg-type]
        if not expect:
            await anyio.sleep(0.5)
            return
        with anyio.fail_after(10):
            while (await self.kept())[-1] != ("waiting" if reason else "running", reason):  # noqa: ASYNC110 - as readers
                await anyio.sleep(0.02)


async def test_what_a_dataset_waits_for_next_is_kept_and_told_but_not_every_second_or_byte_of_it(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mover.daemon_work._SETTLES_S", 0.1)
    relay = ProgressRelay()
    slot, space = "a slot of LTS_FREE_LIMIT (held by other_1.tar)", "the LTS lacks 5,000 of 9,000 bytes"
    async with steered_service(config, relay) as (service, steered):
        job, _ = await service.submit(order(DATASET), owner="ann")
        await until(lambda: service.statistics().running == 1)
        waits = _Waits(service, relay, job.id)
        await waits.tell(slot)
        await waits.tell(space)
        now = await service.job(job.id)
        assert (now.state, now.reason) == ("waiting", space)
        await waits.tell("the LTS lacks 4,000 of 9,000 bytes (30 s)", expect=False)
        await waits.tell(slot)
        await waits.tell("")
        assert await waits.kept() == [
            *(("running", ""), ("waiting", slot), ("waiting", space), ("waiting", slot), ("running", ""))
        ]
        assert steered.gate is not None
        steered.gate.set()
        await ended(service, job.id)


async def test_reasons_that_change_for_ever_are_kept_a_number_of_times_and_the_end_of_the_wait_all_the_same(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mover.daemon_work._SETTLES_S", 0.1)
    monkeypatch.setattr("mover.daemon_work._CHANGES", 6)
    relay = ProgressRelay()
    async with steered_service(config, relay) as (service, _):
        job, _ = await service.submit(order(DATASET), owner="ann")
        await until(lambda: service.statistics().running == 1)
        waits = _Waits(service, relay, job.id)
        for reason in "abc":
            await waits.tell(reason)
        await waits.tell("d", expect=False)
        await waits.tell("")
        assert [reason for _, reason in await waits.kept()] == ["", "a", "b", "c", ""]


def test_a_wait_is_the_same_whatever_its_numbers_and_the_order_of_its_parts() -> None:
    lacks, slot = "the LTS lacks 5,000 of 9,000 bytes", "a slot of LTS_FREE_LIMIT (held by x_1.tar)"
    assert is_same_wait(f"{lacks}; {slot}", f"{slot}; the LTS lacks 40 of 9,000 bytes (1,300 s)")
    assert not is_same_wait(lacks, f"{lacks}; {slot}")
    assert not is_same_wait(slot, "a slot of MOVE_TO_LTS_LIMIT (held by x_1.tar)")
    assert not is_same_wait(slot, "")


@pytest.mark.slow
async def test_progress_is_told_eight_times_a_second_whatever_the_engine_tells_and_the_last_of_it_counts(
    config: EngineConfig,
) -> None:
    relay = ProgressRelay()
    async with steered_service(config, relay) as (service, steered):
        assert steered.gate is not None
        job, _ = await service.submit(order(DATASET), owner="ann")
        seen: list[JobEvent] = []

        async def read() -> None:
            async for event in service.events(job.id):
                if event.type == "progress":
                    seen.append(event)  # noqa: PERF401 - looked at while it grows

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await until(lambda: service.statistics().running == 1)
            began = anyio.current_time()
            done_bytes = 0
            while (elapsed_s := anyio.current_time() - began) < 1.5 or len(seen) < 5 or done_bytes < 9 * len(seen):
                done_bytes += 1
                relay.tell(Progress(DATASET, Stage.MOVE, "progress", 1, done_bytes, 1_000_000))
                await anyio.sleep(0.001)
            await until(lambda: bool(seen) and seen[-1].dataset.done_bytes == done_bytes)  # type: ignore[union-attr]
            told = sum(event.dataset is not None and event.dataset.done_bytes > 0 for event in seen)
            steered.gate.set()
        assert 3 <= told <= 8 * (elapsed_s + 1)
        assert done_bytes > 5 * told
