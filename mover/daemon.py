"""The daemon: engine, jobs, interface, health and page in one process, from its start to its orderly end.

The interface comes first and goes last. The engine opens as soon as the LTS works, however long that takes; what was
accepted before waits for it, and /readyz says what is missing.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack

import anyio
import anyio.to_thread
from anyio.abc import TaskStatus

from mover.api import LimitsChange
from mover.daemon_engine import EngineKeeper, LateStarter
from mover.daemon_health import Finding, HealthMonitor, Probe
from mover.daemon_http import DaemonApp
from mover.daemon_http_access import Access
from mover.daemon_notify import Notifier
from mover.daemon_pages import application
from mover.daemon_prefect import PrefectStarter
from mover.daemon_probes import LtsProbe, open_probes
from mover.daemon_scicat import CatalogueTrigger
from mover.daemon_server import DaemonServer, check_address, listen
from mover.daemon_view import DaemonView
from mover.daemon_watchdog import LoopWatchdog
from mover.errors import ExitCode, ListenError, MoverError
from mover.settings import Settings, setting_rows
from mover.settings_rules import Secret
from mover.tasks import open_task_group
from mover.wiring import engine_config, scicat_access

__all__ = ["serve"]

_log = logging.getLogger(__name__)

_LIMITS = ("LTS_FREE_LIMIT", "MOVE_TO_LTS_LIMIT", "VERIFY_LTS_LIMIT", "LTS_TO_RETRIEVAL_LIMIT")
_CLOSING_S = 30.0  # what the end may take besides the deadline of running work


async def serve(settings: Settings, load: Callable[[], Settings], *, environ: Mapping[str, str] | None = None) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        settings: the configuration.
        load: reads it again, for SIGHUP; blocking; raises ConfigError.
        environ: says where the service manager and Prefect are; None: the process's own.

    Raises:
        ConfigError: a setting is missing, or it would listen beyond this host without tokens.
        ListenError: it cannot listen there.
        DaemonRunningError: another daemon works on the scratch folder.
    """
    check_address(settings.mover_host, settings.mover_token_file)
    engine_config(settings)  # what is missing is told before anything begins
    access = await anyio.to_thread.run_sync(Access.from_file, settings.mover_token_file)
    with listen(settings.mover_host, settings.mover_port, settings.mover_socket) as sockets:
        await _Daemon(settings, load, access, os.environ if environ is None else environ).run(sockets)


class _Daemon:
    """One run of the daemon."""

    def __init__(
        self, settings: Settings, load: Callable[[], Settings], access: Access, environ: Mapping[str, str]
    ) -> None:
        self._settings, self._load, self._access = settings, load, access
        self._notifier = Notifier(environ)
        self._stopping = anyio.Event()
        self._folder = settings.archiver_scratch_folder / "daemon"
        self._scicat = scicat_access(settings) if settings.scicat_endpoint else None
        self._prefect_url = environ.get("PREFECT_API_URL", "")
        auth = environ.get("PREFECT_API_AUTH_STRING", "")
        self._prefect_auth = Secret(auth) if auth else None
        self._limits_read: dict[str, int] = {name: getattr(settings, name.lower()) for name in _LIMITS}

    async def run(self, sockets: list[socket.socket]) -> None:
        """From the first request to the last."""
        settings = self._settings
        config = engine_config(settings)
        lts = LtsProbe(settings.lts_storage_root, self._folder, settings.lts_free_space_percentage)
        watchdog = LoopWatchdog(self._notifier)
        async with AsyncExitStack() as stack:
            probes = await stack.enter_async_context(
                open_probes(
                    config,
                    lts,
                    self._folder,
                    scicat=self._scicat,
                    prefect_url=self._prefect_url,
                    prefect_auth=self._prefect_auth,
                )
            )
            probes.append(Probe("journal", self._look_at_journal))
            health = HealthMonitor(probes, secrets=_secrets(settings))
            self._view = DaemonView(health, lts, watchdog.state)
            watchdog.on_lag = self._view.metrics.loop_lag.observe
            starter = LateStarter() if self._scicat and not self._prefect_url else None
            trigger = await self._open_trigger(stack, starter)
            self._keeper = EngineKeeper(config, self._folder, self._view, scicat=self._scicat, starter=starter)
            app, gate = application(self._view, self._access, scicat=trigger)
            self._streams = app.streams
            await stack.enter_async_context(watchdog.watching())
            async with open_task_group() as tasks:
                await tasks.start(self._watch_signals)
                tasks.start_soon(health.watch)
                await self._serve(app, DaemonServer(gate), sockets)
                tasks.cancel_scope.cancel()
        _log.info("stopped in order")

    async def _open_trigger(self, stack: AsyncExitStack, starter: LateStarter | None) -> CatalogueTrigger | None:
        """What takes the catalogue's jobs: for Prefect where there is one, else for the daemon itself."""
        if self._prefect_url:
            prefect = await stack.enter_async_context(PrefectStarter.open(self._prefect_url, self._prefect_auth))
            return await stack.enter_async_context(CatalogueTrigger.open(prefect))
        return await stack.enter_async_context(CatalogueTrigger.open(starter)) if starter else None

    async def _look_at_journal(self) -> Finding:
        if (service := self._view.service.now) is None:
            return Finding("not open: it opens with the engine", "degraded")
        await service.check_journal()
        return Finding(f"jobs are kept in {self._folder}")

    async def _serve(self, app: DaemonApp, server: DaemonServer, sockets: list[socket.socket]) -> None:
        where = ", ".join(_name(item) for item in sockets)

        async def answer() -> None:
            await server.serve(sockets)
            if not self._stopping.is_set():
                raise ListenError(where, "the HTTP server ended by itself")

        async with open_task_group() as tasks:
            tasks.start_soon(answer)
            _log.info("listening on %s", where)
            self._notifier.ready(f"listening on {where}")
            await self._keeper.run(self._stopping, self._settings.mover_drain_s)
            app.streams.close()
            server.stop()

    # ----------------------------------------------------------------------------------------------------- its signals
    async def _watch_signals(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            task_status.started()
            async for number in signals:
                if number == signal.SIGHUP:
                    await self._reload()
                elif self._stopping.is_set():
                    _leave("told to stop a second time: what runs is left where it is, and goes on with the next start")
                else:
                    self._begin_to_stop(signal.Signals(number).name)

    def _begin_to_stop(self, why: str) -> None:
        drain_s = self._settings.mover_drain_s
        self._notifier.stopping(f"running work has {drain_s} s to end")
        self._notifier.extend(drain_s + _CLOSING_S)
        self._view.health.report("intake", "failed", f"closed: the daemon was told to stop by {why}", expected=True)
        # A mount that hangs may hold what runs, and with it the loop's end, for ever.
        text = (
            "something in work does not let itself be stopped, and is left where it is; it goes on with the next start"
        )
        timer = threading.Timer(drain_s + _CLOSING_S, _leave, (text, ExitCode.SYSTEM))
        timer.daemon = True
        timer.start()
        self._stopping.set()

    async def _reload(self) -> None:
        """Reads the configuration again: limits and tokens change at once. What is bad changes nothing."""
        self._notifier.reloading()
        refused = []
        for read_again in (self._reload_tokens, self._reload_settings):  # the one whatever becomes of the other
            try:
                await read_again()
            except MoverError as error:
                _log.error("what was read before stays in force: %s", error)
                refused.append(str(error))
        text = f"refused, and as it was before: {'; '.join(refused)}" if refused else "was read again"
        self._view.health.report("configuration", "degraded" if refused else "ok", text)
        self._notifier.ready(f"the configuration {text}" if not refused else f"the configuration is {text}")

    async def _reload_tokens(self) -> None:
        await anyio.to_thread.run_sync(self._access.reload)
        if self._access.guarded:
            _log.info("the token file was read again")
            self._streams.interrupt()  # their readers come back, and are asked for their tokens

    async def _reload_settings(self) -> None:
        fresh = await anyio.to_thread.run_sync(self._load)
        read: dict[str, int] = {name: getattr(fresh, name.lower()) for name in _LIMITS}
        # the others may have been set over the interface since
        slots = {name: number for name, number in read.items() if number != self._limits_read[name]}
        self._limits_read = read
        self._keeper.set_limits({name.lower(): number for name, number in slots.items()})
        if (service := self._view.service.now) is not None:
            before = {limit.name: limit.slots for limit in service.limits()}
            await service.set_limits(LimitsChange(**slots))
            for name, number in slots.items():
                if before[name] != number:
                    _log.info("%s: %d instead of %d", name, number, before[name])
        shown = {row.name: row.value for row in setting_rows(self._settings)}
        for row in setting_rows(fresh):
            if row.value != shown[row.name] and row.name not in _LIMITS:
                _log.warning(
                    "%s=%s takes effect with the next start; now it is %s", row.name, row.value, shown[row.name]
                )


def _leave(text: str, code: int = ExitCode.INTERRUPTED) -> None:
    _log.warning("%s", text)
    sys.stderr.flush()
    os._exit(code)  # what is accepted and what is done is durable at any instant


def _name(item: socket.socket) -> str:
    address = item.getsockname()
    if isinstance(address, str):
        return address
    host, port = address[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _secrets(settings: Settings) -> Sequence[str]:
    known = (settings.minio_password, settings.scicat_password)
    return tuple(secret.reveal() for secret in known if secret is not None)
