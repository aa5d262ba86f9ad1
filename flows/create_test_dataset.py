"""A dataset for trying a deployment: objects in the landing zone, a dataset in the catalogue, as uploads leave it."""

from __future__ import annotations

import uuid
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.settings import read_settings
from mover.scicat import SciCat
from mover.streams.s3 import S3Store
from mover.trial import TrialDataset, upload
from mover.wiring import s3_endpoint, scicat_access

__all__ = ["create_test_dataset", "new_dataset_id"]


def new_dataset_id() -> str:
    """An id that no dataset has."""
    return f"20.500.11935/trial-{uuid.uuid4()}"


def _run_name() -> str:
    return f"create {flow_run.parameters.get('dataset_id') or 'a test dataset'}"


@flow(name="create_test_dataset", flow_run_name=_run_name, persist_result=False)
async def create_test_dataset(
    dataset_id: str | None = None,
    file_count: int = 20,
    file_kib: int = 256,
    dry_run: bool = False,  # noqa: FBT001, FBT002 - a form in Prefect's UI
) -> State[Any]:
    """Creates a dataset that can be archived. Its id is in the run's message.

    Args:
        dataset_id: the PID; none: a new one.
        file_count: how many files; the first one is empty.
        file_kib: about how large each is, KiB.
        dry_run: say what would be created, create nothing.
    """
    settings = await read_settings()
    dataset = TrialDataset(dataset_id or new_dataset_id(), file_count, file_kib << 10)
    files = dataset.files()
    text = f"{dataset.dataset_id}: {len(files):,} file(s), {sum(file.size_bytes for file in files):,} bytes"
    if dry_run:
        return Completed(message=f"{text}; nothing created")
    async with SciCat.open(scicat_access(settings)) as catalogue, S3Store.open(s3_endpoint(settings)) as store:
        await catalogue.trial.announce(dataset.dataset_id, files)  # refuses the id of a dataset that there is
        await upload(store, settings.minio_landingzone_bucket, dataset)
    return Completed(message=text)
