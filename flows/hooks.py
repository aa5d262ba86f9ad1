"""What happens when a job's run is cancelled or killed: the catalogue is told at once, or the next run is started.

Hooks run in the dying process, in another one or, when container and worker are gone, not at all: everything they do
is the reconciler's work done early, and may be done twice. A run that failed is left to the reconciler: what made it
fail, a share that is not mounted or a catalogue that is away, gets its minutes to come back.
"""

from __future__ import annotations

from typing import Any, Final

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State

from flows.progress import run_logger
from flows.services import open_catalogue
from mover.jobs_lifecycle import JobKind

__all__ = ["settle_run"]

_KINDS: Final[dict[str, JobKind]] = {"archive_datasetlist": "archive", "retrieve_datasetlist": "retrieve"}


async def settle_run(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook of cancelled and crashed runs of jobs. What one for some datasets of a job left is the reconciler's."""
    from flows.reconciliation import reconcile_job

    job_id = flow_run.parameters.get("job_id")
    if not isinstance(job_id, str) or flow_run.parameters.get("dry_run") or flow_run.parameters.get("dataset_ids"):
        return
    cancelled_run = flow_run.id if state.is_cancelling() or state.is_cancelled() else None
    async with open_catalogue() as catalogue, get_client() as client:
        for action in await reconcile_job(client, catalogue, _KINDS[flow.name], job_id, cancelled_run=cancelled_run):
            run_logger().warning("%s %s: %s", action.what, action.target, action.reason)
