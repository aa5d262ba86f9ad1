"""Retrieval: a job of the catalogue, and a single dataset or files of it. Parameters in, engine call, state out."""

from __future__ import annotations

from typing import Any, Final

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.artifacts import show_links
from flows.hooks import settle_run
from flows.job import dataset_result, outcome_state, run_job
from flows.services import Services, open_services
from mover.catalogue import JobDataset
from mover.jobs import DatasetResult
from mover.reports import RetrieveReport

__all__ = ["retrieve_dataset", "retrieve_datasetlist"]

_SHOWN_FILES: Final = 100  # of a job's list among the parameters of a dataset's run


@flow(name="retrieve_dataset", flow_run_name="retrieve {dataset_id}", persist_result=False)
async def retrieve_dataset(dataset_id: str, files: list[str] | None = None, dry_run: bool = False) -> State[Any]:  # noqa: FBT001, FBT002 - a form in Prefect's UI
    """Brings one dataset back to the retrieval bucket and tells the catalogue.

    Args:
        dataset_id: the PID.
        files: only these files or folders, each as an object of its own; none: all datablocks.
        dry_run: look only; nothing is written anywhere.
    """
    async with open_services(f"retrieve {dataset_id}") as services:
        if dry_run:
            return Completed(message=await _looked_up(services, dataset_id))
        wanted = services.files.get(dataset_id, tuple(files or ()))
        result = await services.jobs.retrieve(JobDataset(dataset_id, wanted))
        services.retrieved[dataset_id] = result
        if result.report is not None:
            await show_links(result.report)
        return outcome_state(result.outcome)


@flow(
    name="retrieve_datasetlist",
    flow_run_name="retrieve job {job_id}",
    persist_result=False,
    on_cancellation=[settle_run],
    on_crashed=[settle_run],
)
async def retrieve_datasetlist(
    job_id: str,
    dataset_ids: list[str] | None = None,
    dry_run: bool = False,  # noqa: FBT001, FBT002 - a form in Prefect's UI
    again: bool = False,  # noqa: FBT001, FBT002
) -> State[Any]:
    """Retrieves the datasets of a job in the catalogue, or the files of them that it names.

    Args:
        job_id: the catalogue's id of the job.
        dataset_ids: only these datasets of it; none: all.
        dry_run: look only; nothing is written anywhere.
        again: run a job that has ended already. A run that is retried does so as well.
    """
    async with open_services(f"retrieve job {job_id}") as services:

        async def one(dataset: JobDataset) -> DatasetResult[RetrieveReport]:
            services.files[dataset.dataset_id] = dataset.files
            state = await retrieve_dataset(dataset.dataset_id, list(dataset.files[:_SHOWN_FILES]), return_state=True)
            return await dataset_result(services.retrieved, dataset.dataset_id, state)

        if dry_run:
            datasets = await services.jobs.read(job_id, "retrieve", dataset_ids, again=True)
            found = [await _looked_up(services, dataset.dataset_id) for dataset in datasets]
            return Completed(message="; ".join(found))
        retried = (flow_run.run_count or 1) > 1
        return await run_job(services, "retrieve", job_id, dataset_ids, one, again=again or retried)


async def _looked_up(services: Services, dataset_id: str) -> str:
    listings = [listing async for listing in services.engine.datasets(dataset_id)]
    datablocks = sum(listing.datablocks for listing in listings)
    size_bytes = sum(listing.size_bytes for listing in listings)
    return f"{dataset_id}: {datablocks:,} datablock(s), {size_bytes:,} bytes on the LTS; nothing written"
