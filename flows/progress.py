"""What a run shows while it works: one progress artifact, and a log line for everything that waits or fails."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

import anyio
from prefect.artifacts import acreate_progress_artifact, aupdate_progress_artifact
from prefect.exceptions import MissingContextError
from prefect.logging import get_logger, get_run_logger

from mover.amounts import WorkAmounts
from mover.model import Progress, Stage
from mover.shown import bytes_text
from mover.tasks import open_task_group

__all__ = ["Board", "open_board", "run_logger"]

_EVERY_S: Final = 5.0  # an update costs the server some 70 ms


def run_logger() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """The logger of the flow run or task run, or a plain one outside of any."""
    try:
        return get_run_logger()
    except MissingContextError:
        return get_logger("mover")


class Board:
    """Adds up the engine's events. ``tell`` returns at once."""

    def __init__(self) -> None:
        self._amounts = WorkAmounts()
        self._reasons: dict[tuple[str, int, Stage], str] = {}
        self._log = run_logger()

    def tell(self, event: Progress) -> None:
        """One event of the engine."""
        key = (event.dataset_id, event.datablock, event.stage)
        where = f"{event.dataset_id} datablock {event.datablock}" if event.datablock else event.dataset_id
        self._amounts.tell(event)
        if event.stage is Stage.PLAN and event.state == "finished":
            self._log.info("%s: %s planned", where, bytes_text(event.total_bytes))
        elif event.state == "waiting":
            reason = event.reason.partition(" (")[0]
            if self._reasons.get(key) != reason:
                self._reasons[key] = reason
                self._log.info("%s: %s waits: %s", where, event.stage, event.reason)
        elif event.state == "failed":
            self._log.warning("%s: %s failed: %s", where, event.stage, event.reason)

    def waits(self, dataset_id: str, reason: str) -> None:
        """A dataset waits for another run."""
        self.tell(Progress(dataset_id, Stage.LOCK, "waiting", reason=reason))

    def percent(self) -> float:
        """Bytes moved and read back of those planned; 0 as long as no plan is known."""
        done_bytes, expected_bytes = self._amounts.total()
        return 100 * done_bytes / expected_bytes if expected_bytes else 0.0

    def text(self) -> str:
        """The same in words."""
        done_bytes, expected_bytes = self._amounts.total()
        return f"{bytes_text(done_bytes)} moved and read back of {bytes_text(expected_bytes)}"


@asynccontextmanager
async def open_board(title: str) -> AsyncIterator[Board]:
    """A board whose numbers are shown in the run's progress artifact while the block runs."""
    board = Board()
    async with open_task_group() as tasks:
        tasks.start_soon(_show, board, title)
        yield board
        tasks.cancel_scope.cancel()


async def _show(board: Board, title: str) -> None:
    """Artifacts are for looking at: one that cannot be written does not fail the run."""
    artifact_id, shown = None, -1.0
    try:
        while True:
            try:
                if artifact_id is None:
                    artifact_id = await acreate_progress_artifact(board.percent(), description=title)
                elif board.percent() != shown:
                    shown = board.percent()
                    await aupdate_progress_artifact(artifact_id, shown, description=f"{title}: {board.text()}")
            except Exception as error:  # noqa: BLE001 - whatever the server's trouble is
                run_logger().debug("progress is not shown: %s", type(error).__name__)
            await anyio.sleep(_EVERY_S)
    finally:
        if artifact_id is not None:
            with anyio.move_on_after(_EVERY_S, shield=True), suppress(Exception):
                await aupdate_progress_artifact(artifact_id, board.percent(), description=f"{title}: {board.text()}")
