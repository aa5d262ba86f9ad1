"""How often the daemon tells how work stands, whatever its engine tells."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from mover.api import JobEvent
from mover.daemon_events import ProgressRelay
from mover.daemon_jobs import JobService
from mover.engine import Engine, EngineConfig
from mover.model import Progress, Stage
from mover.parts import Buckets
from tests.datasets import DATASET, make_config, upload
from tests.job_services import Steered, order, service_config, until
from tests.servers import S3Server, fresh_bucket

pytestmark = pytest.mark.anyio


@pytest.fixture
def config(tmp_path: Path, moto_server: S3Server) -> Iterator[EngineConfig]:
    with fresh_bucket(moto_server) as one, fresh_bucket(moto_server) as two, fresh_bucket(moto_server) as three:
        upload(moto_server, one, {"a": b"a file"})
        yield make_config(tmp_path, moto_server, Buckets(one, two, three))


@pytest.mark.slow
async def test_progress_is_told_eight_times_a_second_whatever_the_engine_tells_and_the_last_of_it_counts(
    config: EngineConfig,
) -> None:
    relay = ProgressRelay()
    async with Engine.open(config, tell=relay.tell) as engine:
        steered = Steered(engine)
        steered.gate = anyio.Event()
        jobs = service_config(config.scratch_folder)
        async with JobService.open(engine, jobs, progress=relay, runner=steered) as service:
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
