"""The trial of a deployment: creates a dataset, orders its archival and retrieval, compares what comes back.

The two jobs run through their own deployments, on whatever workers there are, while this run waits for them.
"""

from __future__ import annotations

from typing import Any, Final

import anyio
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.flow_runs import wait_for_flow_run
from prefect.states import Completed, Failed

from flows.artifacts import show_table
from flows.create_test_dataset import create_test_dataset, new_dataset_id
from flows.progress import run_logger
from flows.runs import start_run
from flows.settings import read_settings
from mover.catalogue import CatalogueJob, JobDataset
from mover.jobs_lifecycle import SUCCESSFUL, JobKind
from mover.scicat import SciCat
from mover.settings import Settings
from mover.trial import TrialDataset, compare_links
from mover.wiring import scicat_access

__all__ = ["end_to_end_test"]

_POLL_S: Final = 2


@flow(name="end_to_end_test", persist_result=False)
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
        trial = _Trial(catalogue, settings, dataset, timeout_s)
        problem = await trial.run()
    await show_table("end-to-end-test", f"Trial of {dataset.dataset_id}", trial.rows)
    return (
        Failed(message=problem) if problem else Completed(message=f"{dataset.dataset_id}: {file_count:,} file(s) equal")
    )


class _Trial:
    """The steps of one trial; ``rows`` tells them with what the catalogue said."""

    def __init__(self, catalogue: SciCat, settings: Settings, dataset: TrialDataset, timeout_s: int) -> None:
        self._catalogue, self._settings, self._dataset, self._timeout_s = catalogue, settings, dataset, timeout_s
        self._began = anyio.current_time()
        self.rows: list[dict[str, Any]] = []

    async def run(self) -> str:
        """All steps; returns what went wrong, or ''."""
        await self._note("created")
        _, problem = await self._job("archive")
        if problem:
            return problem
        job, problem = await self._job("retrieve")
        if problem:
            return problem
        links = [(row["name"], row["url"]) for row in job.result.get("result", [])]
        differences = await compare_links(links, self._dataset, self._settings.archiver_scratch_folder)
        await self._note("compared: " + (", ".join(differences[:5]) or f"{self._dataset.file_count:,} file(s) equal"))
        return f"{len(differences):,} difference(s), the first: {differences[0]}" if differences else ""

    async def _job(self, kind: JobKind) -> tuple[CatalogueJob, str]:
        """The finished job, and what is wrong with it, or ''."""
        job_id = await self._catalogue.trial.order(kind, [JobDataset(self._dataset.dataset_id)])
        async with get_client() as client:
            run = await start_run(client, kind, job_id, 1)
        run = await wait_for_flow_run(run.id, timeout=self._timeout_s, poll_interval=_POLL_S)
        job = await self._catalogue.job(job_id)
        await self._note(f"{kind} job", job)
        if job.status_code == SUCCESSFUL:
            return job, ""
        return job, f"the {kind} job ended as {job.status_code!r}, its run {run.name!r} as {run.state_name}"

    async def _note(self, step: str, job: CatalogueJob | None = None) -> None:
        now = await self._catalogue.lifecycle(self._dataset.dataset_id)
        row = {
            "step": step,
            "at s": round(anyio.current_time() - self._began, 1),
            "job": job.status_code if job else "",
            "archivable": now.archivable,
            "retrievable": now.retrievable,
            "archive status": now.archive_status_message,
            "retrieve status": now.retrieve_status_message,
        }
        self.rows.append(row)
        run_logger().info("%s", ", ".join(f"{name} {value}" for name, value in row.items() if value != ""))
