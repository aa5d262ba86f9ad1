"""Retrieval: a job of the catalogue, and a single dataset or files of it. Parameters in, engine call, state out."""

from __future__ import annotations

from typing import Any, Final

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.artifacts import show_links
from flows.hooks import settle_run
from flows.job import dataset_result, dry_run_state, outcome_state, run_job
from flows.services import Services, open_services
from mover.catalogue import JobDataset
from mover.engine import Engine
from mover.errors import MoverError, UnknownFileError
from mover.jobs import DatasetResult
from mover.reports import RetrieveReport
from mover.retrieve_copy import Selection

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
        wanted = JobDataset(dataset_id, services.files.get(dataset_id, tuple(files or ())))
        if dry_run:
            return Completed(message=f"{await _looked_up(services, wanted)}; nothing written")
        result = await services.jobs.retrieve(wanted)
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
            return await _look_only(services, job_id, dataset_ids)
        retried = (flow_run.run_count or 1) > 1
        return await run_job(services, "retrieve", job_id, dataset_ids, one, again=again or retried)


async def _look_only(services: Services, job_id: str, dataset_ids: list[str] | None) -> State[Any]:
    found, failures = [], []
    for dataset in await services.jobs.read(job_id, "retrieve", dataset_ids, again=True):
        try:
            found.append(await _looked_up(services, dataset))
        except MoverError as error:
            if error.retryable:
                raise
            failures.append(str(error))
    return dry_run_state(found, failures)


async def _looked_up(services: Services, dataset: JobDataset) -> str:
    """What is there to retrieve. A daemon names no files: with one, they are looked for by the run itself."""
    dataset_id, engine = dataset.dataset_id, services.engine
    if dataset.files and isinstance(engine, Engine):
        selection = Selection(dataset.files)
        sizes = [member.size_bytes async for _, member in engine.members(dataset_id) if selection.takes(member.path)]
        if selection.unknown:
            raise UnknownFileError(dataset_id, selection.unknown)
        return f"{dataset_id}: {len(sizes):,} file(s), {sum(sizes):,} bytes on the LTS"
    listings = [listing async for listing in engine.datasets(dataset_id)]
    datablocks = sum(listing.datablocks for listing in listings)
    size_bytes = sum(listing.size_bytes for listing in listings)
    return f"{dataset_id}: {datablocks:,} datablock(s), {size_bytes:,} bytes on the LTS"
