"""Trying a deployment as a facility's people use it: ``python -m flows.trial [--files N] [--file-kib N]``.

A dataset is created by the deployment ``dataset_creation``, its archival and its retrieval are ordered in the catalogue
and done by runs of the two deployments, and what the download links give is compared byte for byte. Prints what the
catalogue shows after every step. Exit codes: 0 all bytes are equal; 1 something failed; 2 the configuration is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import anyio
from prefect.client.orchestration import get_client
from prefect.exceptions import FlowRunWaitTimeout, ObjectNotFound
from prefect.flow_runs import wait_for_flow_run

from flows.configuration_server import connect
from flows.create_test_dataset import new_dataset_id
from flows.runs import start_run
from flows.settings import read_settings
from mover.catalogue import CatalogueJob, JobDataset
from mover.cli_errors import record_of
from mover.errors import ConfigError, ExitCode, MoverError
from mover.jobs_lifecycle import SUCCESSFUL, JobKind
from mover.scicat import SciCat
from mover.settings import Settings
from mover.trial import TrialDataset, compare_links
from mover.wiring import scicat_access

__all__ = ["CREATION", "Trial", "main"]

CREATION: Final = "create_test_dataset/dataset_creation"
"""The deployment that creates the dataset."""


class Trial:
    """One trial; every step is kept in ``rows`` and told, with what the catalogue shows then."""

    def __init__(
        self,
        catalogue: SciCat,
        settings: Settings,
        dataset: TrialDataset,
        timeout_s: int,
        tell: Callable[[str], None],
    ) -> None:
        """``timeout_s``: how long each step may take."""
        self._catalogue, self._settings, self._dataset, self._timeout_s = catalogue, settings, dataset, timeout_s
        self._tell = tell
        self._began = anyio.current_time()
        self.rows: list[dict[str, Any]] = []

    async def create(self) -> str:
        """The dataset, by a run of its deployment; returns what went wrong, or ''.

        Raises:
            ConfigError: the flows are not deployed.
        """
        dataset = self._dataset
        parameters = {
            "dataset_id": dataset.dataset_id,
            "file_count": dataset.file_count,
            "file_kib": dataset.file_bytes >> 10,
        }
        async with get_client() as client:
            try:
                deployment = await client.read_deployment_by_name(CREATION)
            except ObjectNotFound as error:
                raise ConfigError("deployment", CREATION, "deployed, by python -m flows.deploy") from error
            run = await client.create_flow_run_from_deployment(
                deployment.id, parameters=parameters, name=f"create {dataset.dataset_id}"
            )
        run = await wait_for_flow_run(run.id, timeout=self._timeout_s)
        if run.state is not None and run.state.is_completed():
            return ""
        return f"the run {run.name!r} that creates the dataset ended as {run.state_name}"

    async def run(self) -> str:
        """Archives, retrieves, compares; returns what went wrong, or ''."""
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
        run = await wait_for_flow_run(run.id, timeout=self._timeout_s)
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
        self._tell(", ".join(f"{name} {value}" for name, value in row.items() if value != ""))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.trial", description="Tries the deployment with a dataset.")
    parser.add_argument("--files", type=int, default=40, metavar="N", help="how many files (40)")
    parser.add_argument("--file-kib", type=int, default=2048, metavar="KIB", help="about how large each is (2048)")
    parser.add_argument("--timeout-s", type=int, default=600, metavar="S", help="how long a step may take (600 s)")
    options = parser.parse_args(arguments)
    try:
        problem = anyio.run(_try, options)
    except MoverError as error:
        record = record_of(error)
        sys.stderr.write(f"{record.message}\n")
        return record.exit_code
    except FlowRunWaitTimeout as error:
        problem = f"no end within {options.timeout_s} s: {error}"
    sys.stdout.write(f"{problem or 'done: what came back is equal, byte for byte'}\n")
    return int(ExitCode.SYSTEM if problem else ExitCode.DONE)


async def _try(options: argparse.Namespace) -> str:
    dataset = TrialDataset(new_dataset_id(), options.files, options.file_kib << 10)
    async with connect(60.0):
        settings = await read_settings()
    async with SciCat.open(scicat_access(settings)) as catalogue:
        trial = Trial(catalogue, settings, dataset, options.timeout_s, lambda text: print(text, flush=True))  # noqa: T201
        sys.stdout.write(f"dataset {dataset.dataset_id}\n")
        return await trial.create() or await trial.run()


if __name__ == "__main__":
    sys.exit(main())
