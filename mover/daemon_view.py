"""What the daemon shows of itself: one place that knows loop, dependencies, engine and queue, now."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, cast

from mover.daemon_health import HealthMonitor, Readiness
from mover.daemon_jobs import JobService, QueueStatistics
from mover.daemon_metrics import DaemonMetrics
from mover.daemon_page import render_page
from mover.daemon_page_parts import FailureNote, PageData
from mover.daemon_probes import LtsProbe
from mover.daemon_watchdog import LoopState
from mover.engine import Engine, EngineStatistics
from mover.errors import NotOpenError

__all__ = ["DaemonView", "LateService"]

_SHOWN_FAILURES = 15
_PAGE_LIVES_S = 1.0


class LateService:
    """The jobs, as soon as they are open: until then, and after the end, every use of them is a NotOpenError."""

    def __init__(self) -> None:
        self._service: JobService | None = None

    def set(self, service: JobService | None) -> None:
        """From now on the service is this one."""
        self._service = service

    @property
    def now(self) -> JobService | None:
        """The service, if it is open."""
        return self._service

    def as_service(self) -> JobService:
        """This object in the service's place."""
        return cast("JobService", self)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the service has
        if name.startswith("_"):
            raise AttributeError(name)
        if self._service is None:
            raise NotOpenError
        return getattr(self._service, name)


class DaemonView:
    """The daemon's state for health, metrics and page; belongs to its event loop."""

    def __init__(self, health: HealthMonitor, lts: LtsProbe, loop: Callable[[], LoopState]) -> None:
        self.health, self.lts, self.loop = health, lts, loop
        self.service = LateService()
        self.engine: Engine | None = None
        self.metrics = DaemonMetrics(health, lts, loop, engine=self._engine_statistics, queue=self._queue_statistics)
        self._host = socket.gethostname()
        self._began_s = time.monotonic()
        self._failures: deque[FailureNote] = deque(maxlen=_SHOWN_FAILURES)
        self._pages: dict[bool, tuple[float, str]] = {}

    @property
    def host(self) -> str:
        """Name of this machine."""
        return self._host

    def readiness(self) -> Readiness:
        """As the dependencies were found last."""
        return self.health.readiness()

    async def follow(self, service: JobService) -> None:
        """Keeps the last failures in mind, until it is cancelled."""
        async for event in service.all_events():
            change = event.transition
            if change is not None and change.state == "failed" and change.dataset_id:
                self._failures.appendleft(FailureNote(change.at, event.job_id, change.dataset_id, change.reason))

    def page(self, *, guarded: bool) -> str:
        """The live page; made at most once a second, however many look at it."""
        made_s, text = self._pages.get(guarded, (0.0, ""))
        now_s = time.monotonic()
        if not text or now_s - made_s >= _PAGE_LIVES_S:
            text = render_page(self._page_data(guarded=guarded))
            self._pages[guarded] = (now_s, text)
        return text

    def _page_data(self, *, guarded: bool) -> PageData:
        queue, engine, meter = self._queue_statistics(), self._engine_statistics(), self.metrics.meter
        work = queue.working if queue else ()
        service = self.service.now
        return PageData(
            host=self._host,
            now=datetime.now(UTC),
            uptime_s=time.monotonic() - self._began_s,
            readiness=self.readiness(),
            loop=self.loop(),
            rates=meter.rates(),
            queue=queue,
            work_rates=tuple(meter.rate_of(item.dataset.dataset_id, item.dataset.stage) for item in work),
            limits=service.limits() if service else (),
            space=self.lts.reading,
            floor_bytes=self.lts.floor_bytes,
            reserved_bytes=engine.space.reserved_bytes if engine else 0,
            failures=tuple(self._failures),
            guarded=guarded,
        )

    def _engine_statistics(self) -> EngineStatistics | None:
        return self.engine.statistics() if self.engine else None

    def _queue_statistics(self) -> QueueStatistics | None:
        service = self.service.now
        return service.statistics() if service else None
