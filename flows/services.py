"""What a flow run works with: settings, catalogue, engine and the board; opened once for a run and its subflows."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import NamedTuple

import anyio.to_thread
import msgspec
from prefect.runtime import flow_run

from flows.limits import read_limits
from flows.progress import Board, open_board
from flows.settings import read_settings
from flows.slots import open_slots
from flows.stages import StageTasks
from mover.api_client import DaemonClient, daemon_access
from mover.api_engine import RemoteEngine
from mover.engine import Engine
from mover.jobs import DatasetResult, JobRunner
from mover.reports import ArchiveReport, RetrieveReport
from mover.scicat import SciCat
from mover.settings import Settings
from mover.wiring import engine_config, scicat_access

__all__ = ["Services", "open_catalogue", "open_services"]


class Services(NamedTuple):
    """The open parts of a run.

    ``archived``, ``retrieved``: what the runs of single datasets came to, for their job. ``files``: what a job wants of
    each dataset; a list of files can be longer than what Prefect takes as a parameter.
    """

    settings: Settings
    catalogue: SciCat
    engine: Engine | RemoteEngine
    jobs: JobRunner
    board: Board
    archived: dict[str, DatasetResult[ArchiveReport]]
    retrieved: dict[str, DatasetResult[RetrieveReport]]
    files: dict[str, tuple[str, ...]]


_open: ContextVar[Services] = ContextVar("services")


@asynccontextmanager
async def open_services(title: str) -> AsyncIterator[Services]:
    """The services of this run; inside another run's block they are the same. ``title`` heads the progress artifact.

    Raises:
        ConfigError: settings or limits are missing or wrong.
        CatalogueAccessError, CatalogueTransientError: the catalogue refuses or is away.
        LtsError: the mount is missing or cannot be used.

    With MOVER_URL in the environment, the daemon there does what the engine does, and no engine is opened here.
    """
    outer = _open.get(None)
    if outer is not None:
        yield outer
        return
    settings = await read_settings()
    async with _open_parts(title, settings) as services:
        token = _open.set(services)
        try:
            yield services
        finally:
            _open.reset(token)


@asynccontextmanager
async def _open_parts(title: str, settings: Settings) -> AsyncIterator[Services]:
    async with SciCat.open(scicat_access(settings)) as catalogue, open_board(title) as board:
        opened = (
            _open_remote(settings, board) if os.environ.get("MOVER_URL") else _open_here(settings, catalogue, board)
        )
        async with opened as engine:
            jobs = JobRunner(engine, catalogue, on_wait=board.waits)
            yield Services(settings, catalogue, engine, jobs, board, {}, {}, {})


@asynccontextmanager
async def _open_remote(settings: Settings, board: Board) -> AsyncIterator[RemoteEngine]:
    """The daemon's engine, which holds the limits by itself. Its jobs belong to this flow run, retries included."""
    url = os.environ["MOVER_URL"]
    access = await anyio.to_thread.run_sync(daemon_access, url, settings.mover_token_file)
    async with DaemonClient.open(access) as client:
        yield RemoteEngine(client, run=str(flow_run.id), tell=board.tell, registered=True)


@asynccontextmanager
async def _open_here(settings: Settings, catalogue: SciCat, board: Board) -> AsyncIterator[Engine]:
    # The server's limits are the ones that hold; the engine asks for no more slots than they have. A limit of 0 is a
    # pause: the engine asks for one slot, and the server lends none.
    limits = {name.lower(): max(slots, 1) for name, slots in (await read_limits()).items()}
    config = msgspec.structs.replace(engine_config(settings), **limits)
    async with (
        open_slots() as slots,
        Engine.open(config, catalogue=catalogue, tell=board.tell, run_stage=StageTasks(slots)) as engine,
    ):
        yield engine


@asynccontextmanager
async def open_catalogue() -> AsyncIterator[SciCat]:
    """The catalogue alone, for runs that move no bytes.  Raises as ``open_services``."""
    async with SciCat.open(scicat_access(await read_settings())) as catalogue:
        yield catalogue
