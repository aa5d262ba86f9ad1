"""Archiving: a job of the catalogue, and a single dataset. Parameters in, engine call, state out."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.artifacts import show_datablocks, show_plan
from flows.hooks import settle_run
from flows.job import dataset_result, dry_run_state, outcome_state, run_job
from flows.services import Services, open_services
from mover.catalogue import JobDataset
from mover.jobs import DatasetResult
from mover.reports import ArchiveReport

__all__ = ["archive_dataset", "archive_datasetlist"]


@flow(name="archive_dataset", flow_run_name="archive {dataset_id}", persist_result=False)
async def archive_dataset(dataset_id: str, dry_run: bool = False, release_source: bool = True) -> State[Any]:  # noqa: FBT001, FBT002 - a form in Prefect's UI
    """Archives one dataset and tells the catalogue.

    Args:
        dataset_id: the PID.
        dry_run: plan only; nothing is written anywhere.
        release_source: delete the objects in the landing zone once they are proved and registered.
    """
    async with open_services(f"archive {dataset_id}") as services:
        if dry_run:
            plan = await services.engine.plan(dataset_id)
            await show_plan(plan)
            return Completed(
                message=f"{len(plan.datablocks):,} datablock(s), {plan.size_bytes:,} bytes; nothing written"
            )
        result = await services.jobs.archive(dataset_id, release_source=release_source)
        services.archived[dataset_id] = result
        if result.report is not None:
            await show_datablocks(result.report)
        return outcome_state(result.outcome)


@flow(
    name="archive_datasetlist",
    flow_run_name="archive job {job_id}",
    persist_result=False,
    on_cancellation=[settle_run],
    on_crashed=[settle_run],
)
async def archive_datasetlist(
    job_id: str,
    dataset_ids: list[str] | None = None,
    dry_run: bool = False,  # noqa: FBT001, FBT002 - a form in Prefect's UI
    release_source: bool = True,  # noqa: FBT001, FBT002
    again: bool = False,  # noqa: FBT001, FBT002
) -> State[Any]:
    """Archives the datasets of a job in the catalogue.

    Args:
        job_id: the catalogue's id of the job.
        dataset_ids: only these datasets of it; none: all.
        dry_run: plan only; nothing is written anywhere.
        release_source: delete the objects in the landing zone once they are proved and registered.
        again: run a job that has ended already. A run that is retried does so as well.
    """
    async with open_services(f"archive job {job_id}") as services:

        async def one(dataset: JobDataset) -> DatasetResult[ArchiveReport]:
            state = await archive_dataset(dataset.dataset_id, release_source=release_source, return_state=True)
            return await dataset_result(services.archived, dataset.dataset_id, state)

        if dry_run:
            return await _plan_only(services, job_id, dataset_ids)
        retried = (flow_run.run_count or 1) > 1
        return await run_job(services, "archive", job_id, dataset_ids, one, again=again or retried)


async def _plan_only(services: Services, job_id: str, dataset_ids: list[str] | None) -> State[Any]:
    datasets = await services.jobs.read(job_id, "archive", dataset_ids, again=True)
    failures = []
    for dataset in datasets:
        state = await archive_dataset(dataset.dataset_id, dry_run=True, return_state=True)
        if not state.is_completed():
            failures.append(str(await state.aresult(raise_on_failure=False)))
    return dry_run_state([f"{len(datasets) - len(failures)} of {len(datasets)} dataset(s) planned"], failures)
