"""The commands of the way forward: plan, archive, verify, repair."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Literal, TypeVar

import msgspec

from mover import cli_remote
from mover.cli_estimate import Forecast, Rates, forecast
from mover.cli_outcomes import planned, worked
from mover.cli_run import Outcome, Session, each_dataset
from mover.cli_tables import print_table
from mover.engine import Engine
from mover.errors import DatasetNotFoundError
from mover.model import DatasetPlan, ManifestMember, Progress, Stage
from mover.policies.busy import while_busy
from mover.reports import ArchiveReport, DatablockReport, VerifyReport
from mover.wiring import engine_config

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["archive", "open_engine", "patiently", "plan", "repair", "verify"]

T = TypeVar("T")

_VerifyLevel = Literal["written", "read-back", "recalled"]


@asynccontextmanager
async def open_engine(session: Session) -> AsyncIterator[Engine]:
    """The engine of one command; its progress goes to the command's display."""
    async with Engine.open(engine_config(session.settings), tell=session.display.tell) as engine:
        yield engine


async def patiently(session: Session, dataset_id: str, wait_s: float, call: Callable[[], Awaitable[T]]) -> T:
    """Calls again while another run holds the dataset, for up to ``wait_s`` seconds.  Raises DatasetBusyError."""

    def on_wait(reason: str) -> None:
        session.display.tell(Progress(dataset_id, Stage.LOCK, "waiting", reason=reason))

    return await while_busy(call, wait_s, on_wait)


async def plan(session: Session, dataset_ids: Sequence[str], rates: Rates, *, members: bool) -> Outcome:
    """What archiving would write; nothing is changed."""
    if session.remote:
        if members:
            cli_remote.refuse_here("a list of members")
        return await cli_remote.plan(session, dataset_ids, rates)
    async with open_engine(session) as engine:

        async def work(dataset_id: str) -> tuple[DatasetPlan, Forecast]:
            found = await engine.plan(dataset_id)
            percentage = session.settings.lts_free_space_percentage
            return found, forecast(found, await engine.space(), percentage, rates)

        results = await each_dataset(dataset_ids, work)

    return planned(results.reports, results.failures, members=members)


async def archive(session: Session, dataset_ids: Sequence[str], *, release_source: bool, wait_s: float) -> Outcome:
    """Archives datasets side by side."""
    if session.remote:
        return await cli_remote.archive(session, dataset_ids, release_source=release_source)
    async with open_engine(session) as engine:

        async def work(dataset_id: str) -> ArchiveReport:
            return await patiently(
                session, dataset_id, wait_s, lambda: engine.archive(dataset_id, release_source=release_source)
            )

        results = await each_dataset(dataset_ids, work)

    return worked(results.reports, results.failures, "archived")


async def verify(session: Session, dataset_ids: Sequence[str], level: _VerifyLevel, *, dry_run: bool) -> Outcome:
    """Compares datablocks with their manifests; reads only."""
    if session.remote:
        if dry_run:
            cli_remote.refuse_here("--dry-run of verify")
        return await cli_remote.verify(session, dataset_ids, level)
    async with open_engine(session) as engine:
        if dry_run:
            return await _would_read(engine, dataset_ids)

        async def work(dataset_id: str) -> VerifyReport:
            return await engine.verify(dataset_id, level=level)

        results = await each_dataset(dataset_ids, work)

    return worked(results.reports, results.failures, "verified")


class _Extent(msgspec.Struct):
    """What of one datablock a command would touch."""

    dataset_id: str
    datablock: int
    members: int = 0
    payload_bytes: int = 0

    def add(self, member: ManifestMember) -> None:
        self.members += 1
        self.payload_bytes += member.size_bytes


async def _extents(engine: Engine, dataset_id: str, number: int | None = None) -> list[_Extent]:
    found: dict[int, _Extent] = {}
    async for datablock, member in engine.members(dataset_id):
        if number in {None, datablock}:
            found.setdefault(datablock, _Extent(dataset_id, datablock)).add(member)
    if number is not None and not found:
        raise DatasetNotFoundError(dataset_id, f"datablock {number}")
    return list(found.values())


async def _would_read(engine: Engine, dataset_ids: Sequence[str]) -> Outcome:
    results = await each_dataset(dataset_ids, lambda dataset_id: _extents(engine, dataset_id))
    extents = [item for report in results.reports for item in report]
    return _dry_run(extents, "would be read and compared", results.failures)


def _dry_run(extents: list[_Extent], words: str, failures: tuple[tuple[str, Exception], ...] = ()) -> Outcome:
    def show(console: Console) -> None:
        rows = [
            (item.dataset_id, str(item.datablock), f"{item.members:,}", f"{item.payload_bytes:,}") for item in extents
        ]
        print_table(console, "", ("dataset", ">datablock", ">members", ">payload"), rows)
        console.print(f"{len(extents):,} datablock(s) {words}; nothing was done (--dry-run)")

    return Outcome({"dry_run": True, "datablocks": extents}, show, failures)


async def repair(session: Session, dataset_id: str, number: int, *, wait_s: float, dry_run: bool) -> Outcome:
    """Rebuilds one datablock."""
    if session.options.url:
        cli_remote.refuse_here("repair")
    async with open_engine(session) as engine:
        if dry_run:
            return _dry_run(await _extents(engine, dataset_id, number), "would be rebuilt")
        report = await patiently(session, dataset_id, wait_s, lambda: engine.repair(dataset_id, number))

    def show(console: Console) -> None:
        _print_repair(console, dataset_id, report)

    return Outcome({"dataset_id": dataset_id, "datablock": report}, show)


def _print_repair(console: Console, dataset_id: str, report: DatablockReport) -> None:
    columns = ("datablock", ">members", ">size", "outcome", "evidence", "digest")
    row = (report.name, f"{report.members:,}", f"{report.size_bytes:,}", "rebuilt", report.evidence, report.digest)
    print_table(console, dataset_id, columns, [row])
