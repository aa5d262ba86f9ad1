"""Keeps an engine open: from the moment when the LTS works to the end, with the jobs that were accepted before."""

from __future__ import annotations

import gc
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import anyio
import msgspec

from mover.catalogue import JobCatalogue
from mover.daemon_catalogue import CatalogueStarter
from mover.daemon_events import ProgressRelay
from mover.daemon_jobs import JobService, JobServiceConfig
from mover.daemon_scicat import Starter
from mover.daemon_view import DaemonView
from mover.engine import Engine, EngineConfig
from mover.errors import DaemonRunningError, MoverError, NotOpenError, UsageError
from mover.jobs_lifecycle import JobKind
from mover.scicat import SciCat, SciCatAccess
from mover.shown import seconds_text
from mover.tasks import open_task_group

__all__ = ["EngineKeeper", "LateStarter"]

_log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
_RECONCILE_S = 300.0


class LateStarter:
    """Starts jobs of the catalogue in the daemon itself, as soon as there is an engine for them; a ``Starter``."""

    def __init__(self) -> None:
        self.inner: Starter | None = None

    async def start(self, kind: JobKind, job_id: str) -> str:
        """See ``Starter``.  Raises NotOpenError, too."""
        if self.inner is None:
            raise NotOpenError
        return await self.inner.start(kind, job_id)


class EngineKeeper:
    """Opens engine and jobs, and shows them to the others through ``view``. What cannot be opened is tried again."""

    def __init__(
        self,
        config: EngineConfig,
        folder: Path,
        view: DaemonView,
        *,
        scicat: SciCatAccess | None = None,
        starter: LateStarter | None = None,
    ) -> None:
        """``starter``: None when the catalogue's jobs are started elsewhere."""
        self.config = config
        self._folder, self._view, self._scicat, self._starter = folder, view, scicat, starter
        self._open = False

    async def run(self, stopping: anyio.Event, drain_s: float) -> None:
        """Until ``stopping``; running work then has ``drain_s`` seconds to end, and is stopped where it is.

        Raises:
            UsageError: what is configured cannot work.
            DaemonRunningError: another daemon works on the folder.
        """
        async with open_task_group() as tasks:
            tasks.start_soon(self._give_up_opening, stopping, tasks.cancel_scope)
            await self._keep_open(stopping, drain_s)
            tasks.cancel_scope.cancel()

    async def _give_up_opening(self, stopping: anyio.Event, cancel_scope: anyio.CancelScope) -> None:
        await stopping.wait()
        if not self._open:
            cancel_scope.cancel()

    async def _keep_open(self, stopping: anyio.Event, drain_s: float) -> None:
        health, pause_s = self._view.health, _FIRST_PAUSE_S
        health.report("engine", "unknown", "waits for the LTS")
        while True:
            await health.until_it_works(
                "lts"
            )  # a mount that hangs would keep the engine waiting, and each try a thread
            try:
                async with self._opened() as service:
                    pause_s = _FIRST_PAUSE_S
                    await self._work(service, stopping, drain_s)
                    return
            except (UsageError, DaemonRunningError):
                raise
            except (MoverError, TimeoutError, OSError) as error:
                reason = str(error) or type(error).__name__
                health.report("engine", "failed", f"{reason}; the next try is in {seconds_text(pause_s)}")
            await anyio.sleep(pause_s)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[JobService]:
        relay, view = ProgressRelay(), self._view
        relay.subscribe(view.metrics.tell)
        async with AsyncExitStack() as stack:
            catalogue: SciCat | None = None
            if self._scicat is not None:
                catalogue = await stack.enter_async_context(SciCat.open(self._scicat))
            engine = await stack.enter_async_context(Engine.open(self.config, catalogue=catalogue, tell=relay.tell))
            settings = JobServiceConfig(folder=self._folder)
            opening = JobService.open(engine, settings, progress=relay, catalogue=catalogue)
            with _sparing_the_collector():
                service = await stack.enter_async_context(opening)
            stack.callback(self._forget)
            self._show(engine, service, catalogue)
            yield service

    def _show(self, engine: Engine, service: JobService, catalogue: JobCatalogue | None) -> None:
        self._open = True
        # they may have been changed while it opened
        engine.set_limits({limit.name: getattr(self.config, limit.name.lower()) for limit in engine.limits()})
        self._view.engine = engine
        self._view.service.set(service)
        if self._starter is not None and catalogue is not None:
            self._starter.inner = CatalogueStarter(service, catalogue, engine)
        self._view.health.report("engine", "ok", "open")
        self._view.health.report("journal", "ok", f"jobs are kept in {self._folder}")

    def _forget(self) -> None:
        self._open = False
        self._view.engine = None
        self._view.service.set(None)
        if self._starter is not None:
            self._starter.inner = None
        self._view.health.report("engine", "unknown", "closed")

    async def _work(self, service: JobService, stopping: anyio.Event, drain_s: float) -> None:
        async with open_task_group() as tasks:
            tasks.start_soon(self._view.follow, service)
            if self._starter is not None and isinstance(self._starter.inner, CatalogueStarter):
                tasks.start_soon(self._starter.inner.watch, _RECONCILE_S)
            await stopping.wait()
            service.close_intake()
            running = service.statistics().running
            _log.info("stopping: %d dataset(s) in work have %.0f s to end", running, drain_s)
            await service.drain(drain_s)
            tasks.cancel_scope.cancel()

    def set_limits(self, slots: dict[str, int]) -> None:
        """From the next engine on, its limits are these, by the names of the settings in lower case."""
        self.config = msgspec.structs.replace(self.config, **slots)


@contextmanager
def _sparing_the_collector() -> Iterator[None]:
    """What is there after the block is never looked at for garbage, nor is anything inside it.

    Modules and clients live as long as the daemon, and jobs that are taken up form no rings: to look for garbage among
    100,000 datasets holds the loop up for some tenths of a second, again and again.
    """
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
