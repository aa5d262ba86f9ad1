"""The reconciler: settles jobs, runs and slots that nobody looks after. Scheduled, and run once at deployment."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.artifacts import show_table
from flows.progress import run_logger
from flows.reconciliation import reconcile_all
from flows.services import open_catalogue

__all__ = ["reconcile"]

_TIMEOUT_S: Final = 1800  # one that hangs would keep all later ones from starting


@flow(name="reconcile", flow_run_name="reconcile", persist_result=False, timeout_seconds=_TIMEOUT_S)
async def reconcile(dry_run: bool = False) -> State[Any]:  # noqa: FBT001, FBT002 - a form in Prefect's UI
    """Looks for jobs whose runs are gone or never began, and for slots that nobody holds.

    Args:
        dry_run: say what would be done, do nothing.
    """
    async with open_catalogue() as catalogue, get_client() as client:
        actions = await reconcile_all(client, catalogue, dry_run=dry_run)
    for action in actions:
        run_logger().info("%s %s: %s", action.what, action.target, action.reason)
    if actions:
        rows = [msgspec.structs.asdict(action) for action in actions]
        await show_table("reconciliation", "What the reconciler did", rows)
    return Completed(message=f"{len(actions)} action(s)" + (", none of them done" if dry_run and actions else ""))
