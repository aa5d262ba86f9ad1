"""The engine that settles what dead runs left: opened when it is first needed, and told for good that it cannot be."""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import anyio
import anyio.to_thread

from flows.settings import read_settings
from mover.api_client import DaemonClient, daemon_access
from mover.api_engine import RemoteEngine
from mover.catalogue import JobCatalogue
from mover.engine import Engine
from mover.errors import DatasetBusyError, MoverError
from mover.jobs_settle import OpenEngine, SettlingEngine
from mover.reports import DatasetListing
from mover.wiring import engine_config

__all__ = ["open_settling"]

_DAEMON_S: Final = 60.0  # what the daemon has to do with a dataset may take hours; the next round comes in minutes


@asynccontextmanager
async def open_settling(catalogue: JobCatalogue) -> AsyncIterator[OpenEngine]:
    """An engine for what needs no limits: looking at datasets, and finishing what lacks only the catalogue.

    With MOVER_URL in the environment it is the daemon's there, as for the runs themselves. It is opened once; where
    that fails everybody who asks for it is told why, so that a mount that hangs is waited for once. What is given
    raises MissingMountError, LtsError and ConfigError.
    """
    async with AsyncExitStack() as stack:
        opened: list[SettlingEngine] = []
        failures: list[MoverError] = []

        @asynccontextmanager
        async def give() -> AsyncIterator[SettlingEngine]:
            if failures:
                raise failures[0]
            if not opened:
                try:
                    opened.append(await _entered(stack, catalogue))
                except MoverError as error:
                    failures.append(error)
                    raise
            yield opened[0]

        yield give


async def _entered(stack: AsyncExitStack, catalogue: JobCatalogue) -> SettlingEngine:
    settings = await read_settings()
    if url := os.environ.get("MOVER_URL"):
        access = await anyio.to_thread.run_sync(daemon_access, url, settings.mover_token_file)
        client = await stack.enter_async_context(DaemonClient.open(access))
        return _DaemonsEngine(client, run=f"settle {uuid.uuid4()}", registered=True)
    return await stack.enter_async_context(Engine.open(engine_config(settings), catalogue=catalogue))


class _DaemonsEngine(RemoteEngine):
    """A daemon's, which does one thing at a time with a dataset: what it is busy with is left to it."""

    async def datasets(self, dataset_id: str | None = None) -> AsyncIterator[DatasetListing]:
        """As there.  Raises DatasetBusyError, too."""
        asked, found = super().datasets(dataset_id), None
        with anyio.move_on_after(_DAEMON_S):
            found = [listing async for listing in asked]
        if found is None:
            raise DatasetBusyError(str(dataset_id), "the daemon")
        for listing in found:
            yield listing
