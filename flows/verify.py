"""Verification of an archived dataset: reads everything back and compares; writes nothing."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.artifacts import show_datablocks
from flows.services import open_services

__all__ = ["verify_dataset"]


@flow(name="verify_dataset", flow_run_name="verify {dataset_id}", persist_result=False)
async def verify_dataset(dataset_id: str, dry_run: bool = False) -> State[Any]:  # noqa: FBT001, FBT002 - a form in Prefect's UI
    """Compares the datablocks of a dataset with their manifests.

    Args:
        dataset_id: the PID.
        dry_run: compare sizes only, read no bytes.

    Raises:
        MoverError: a datablock is missing, differs or cannot be read; the run fails with the reason.
    """
    async with open_services(f"verify {dataset_id}") as services:
        report = await services.engine.verify(dataset_id, level="written" if dry_run else "read-back")
        await show_datablocks(report)
        return Completed(message=f"{len(report.datablocks):,} datablock(s) agree with their manifests")
