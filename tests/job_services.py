"""Job services for tests: on a real engine, with a runner that can be held up, made to fail, and watched."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import msgspec

from mover.api import JobEvent, JobKind, JobOptions, JobOrder, JobView, is_final
from mover.catalogue import JobCatalogue
from mover.daemon_book import Item
from mover.daemon_events import ProgressRelay
from mover.daemon_jobs import JobService, JobServiceConfig
from mover.daemon_runner import EngineRunner, Result
from mover.engine import Engine, EngineConfig
from mover.policies.retry import RetryPolicy

__all__ = ["Steered", "collect", "ended", "open_service", "order", "service_config", "until"]

QUICK = RetryPolicy(attempts=3, base_s=0.02, cap_s=0.05, throttle_base_s=0.02)


class Steered:
    """Runs datasets for real once they are let; ``fail`` is asked for an error before each attempt."""

    def __init__(self, engine: Engine, fail: Callable[[Item, int], Exception | None] = lambda _item, _n: None) -> None:
        self._real = EngineRunner(engine, 1 << 20)
        self._fail = fail
        self.attempts: Counter[str] = Counter()
        self.under_way: set[str] = set()
        self.together: list[frozenset[str]] = []
        self.order: list[str] = []
        self.gate: anyio.Event | None = None

    async def run(self, item: Item) -> Result:
        self.attempts[item.dataset_id] += 1
        assert item.dataset_id not in self.under_way, "a dataset is in work twice"
        self.under_way.add(item.dataset_id)
        self.together.append(frozenset(self.under_way))
        self.order.append(item.dataset_id)
        try:
            if self.gate is not None:
                await self.gate.wait()
            error = self._fail(item, self.attempts[item.dataset_id])
            if error is not None:
                raise error
            return await self._real.run(item)
        finally:
            self.under_way.discard(item.dataset_id)


def service_config(folder: Path, **changes: object) -> JobServiceConfig:
    config = JobServiceConfig(folder=folder / "daemon", retry=QUICK)
    return msgspec.structs.replace(config, **changes)


@asynccontextmanager
async def open_service(
    config: EngineConfig,
    jobs: JobServiceConfig | None = None,
    steer: Callable[[Engine], Steered] | None = None,
    catalogue: JobCatalogue | None = None,
) -> AsyncIterator[JobService]:
    relay = ProgressRelay()
    async with (
        Engine.open(config, tell=relay.tell, catalogue=catalogue) as engine,
        JobService.open(
            engine,
            jobs or service_config(config.scratch_folder),
            progress=relay,
            catalogue=catalogue,
            runner=steer(engine) if steer else None,
        ) as service,
    ):
        yield service


def order(*dataset_ids: str, kind: JobKind = "archive", priority: int = 0, **options: object) -> JobOrder:
    return JobOrder(kind, dataset_ids, msgspec.convert(options, JobOptions), priority)


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    with anyio.fail_after(timeout_s):
        while not condition():  # noqa: ASYNC110 - it looks at the service from outside
            await anyio.sleep(0.01)


async def collect(service: JobService, job_id: str, after: int = 0) -> list[JobEvent]:
    """All events of a job until its end."""
    with anyio.fail_after(30):
        return [event async for event in service.events(job_id, after)]


async def ended(service: JobService, job_id: str) -> JobView:
    """The job, once it has ended."""
    await collect(service, job_id)
    job = await service.job(job_id)
    assert is_final(job.state)
    return job
