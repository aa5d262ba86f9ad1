"""The trial of a deployment as a flow: creates a dataset, orders its archival and retrieval, compares what comes back.

The two jobs run through their own deployments, on whatever workers there are, while this run waits for them.
"""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.artifacts import show_table
from flows.create_test_dataset import create_test_dataset, new_dataset_id
from flows.progress import run_logger
from flows.settings import read_settings
from flows.trial import Trial
from mover.scicat import SciCat
from mover.trial import TrialDataset
from mover.wiring import scicat_access

__all__ = ["end_to_end_test"]


@flow(name="end_to_end_test", flow_run_name="end-to-end test", persist_result=False)
async def end_to_end_test(
    file_count: int = 20,
    file_kib: int = 256,
    timeout_s: int = 900,
    dry_run: bool = False,  # noqa: FBT001, FBT002 - a form in Prefect's UI
) -> State[Any]:
    """Archives and retrieves a test dataset through the deployments, and compares it byte for byte.

    Its pool needs a free slot besides the one that this run takes.

    Args:
        file_count: how many files.
        file_kib: about how large each is, KiB.
        timeout_s: how long each of the two jobs may take.
        dry_run: create nothing; only try settings and catalogue.
    """
    settings = await read_settings()
    dataset = TrialDataset(new_dataset_id(), file_count, file_kib << 10)
    async with SciCat.open(scicat_access(settings)) as catalogue:
        if dry_run:
            check = await catalogue.check()
            return Completed(message=f"catalogue {check.health}, as {check.username}; nothing created")
        created = await create_test_dataset(dataset.dataset_id, file_count, file_kib, return_state=True)
        if not created.is_completed():
            return Failed(message=f"no dataset to try with: {created.message}")
        trial = Trial(catalogue, settings, dataset, timeout_s, run_logger().info)
        problem = await trial.run()
    await show_table("end-to-end-test", f"Trial of {dataset.dataset_id}", trial.rows)
    return (
        Failed(message=problem) if problem else Completed(message=f"{dataset.dataset_id}: {file_count:,} file(s) equal")
    )
