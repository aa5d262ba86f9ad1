"""Everything that flows work with, real and small: S3, the catalogue's fake, a Prefect server, an LTS folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from mover.model import raw_files_prefix
from tests.datasets import random_bytes, upload
from tests.prefect_servers import PrefectServer
from tests.scicat_fake.control import Control
from tests.scicat_fake.server import ScicatServer
from tests.servers import S3Server, fresh_bucket, object_keys

if TYPE_CHECKING:  # a plugin: most runs of pytest do without Prefect, whose import takes seconds
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

__all__ = ["LIMITS", "FlowWorld", "flow_world", "until"]

T = TypeVar("T")

LIMITS = {"LTS_FREE_LIMIT": 1, "MOVE_TO_LTS_LIMIT": 2, "VERIFY_LTS_LIMIT": 1, "LTS_TO_RETRIEVAL_LIMIT": 1}


class FlowWorld:
    """The servers and folders of one test; ``environ`` is what flow runs find their settings in."""

    def __init__(
        self,
        folder: Path,
        s3: S3Server,
        make_bucket: Callable[[], str],
        scicat: ScicatServer,
        prefect: PrefectServer,
    ) -> None:
        self.lts, self.scratch = folder / "lts", folder / "scratch"
        self.s3, self.scicat, self.prefect = s3, scicat, prefect
        self.landing_zone, self.staging, self.retrieval = make_bucket(), make_bucket(), make_bucket()
        self.lts.mkdir()
        self.scratch.mkdir()
        self._runs_before = {run.id for run in self._all_flow_runs()}
        self.settings = {
            "MINIO_ENDPOINT": s3.endpoint_url,
            "MINIO_REGION": s3.region,
            "MINIO_USER": s3.access_key,
            "MINIO_PASSWORD": s3.secret_key,
            "MINIO_LANDINGZONE_BUCKET": self.landing_zone,
            "MINIO_STAGING_BUCKET": self.staging,
            "MINIO_RETRIEVAL_BUCKET": self.retrieval,
            "SCICAT_ENDPOINT": scicat.url,
            "SCICAT_USER": scicat.user,
            "SCICAT_PASSWORD": scicat.password,
            "LTS_STORAGE_ROOT": str(self.lts),
            "LTS_FREE_SPACE_PERCENTAGE": "0",
            "ARCHIVER_SCRATCH_FOLDER": str(self.scratch),
            "ARCHIVER_TARGET_SIZE_MB": "1",
            "MOVER_BUFFER_MB": "64",
        }

    @property
    def control(self) -> Control:
        """The hands on the catalogue."""
        return self.scicat.control

    @property
    def environ(self) -> dict[str, str]:
        """The environment of a flow run's process, or of the worker that starts it."""
        return {**self.prefect.environ, **self.settings}

    @contextmanager
    def client(self) -> Iterator[SyncPrefectClient]:
        """Prefect's client on this server."""
        from prefect.client.orchestration import get_client

        with self.prefect.client_settings(), get_client(sync_client=True) as client:
            yield client

    def set_limits(self, **limits: int) -> None:
        """The four limits, with their documented defaults where nothing is given."""
        from flows.limits import LIMIT_TAGS, limit_name

        with self.client() as client:
            for name, slots in {**LIMITS, **limits}.items():
                client.upsert_global_concurrency_limit_by_name(limit_name(LIMIT_TAGS[name]), slots)

    def set_limit(self, name: str, slots: int) -> None:
        """One limit, by its documented name; the others stay."""
        from flows.limits import LIMIT_TAGS, limit_name

        with self.client() as client:
            client.upsert_global_concurrency_limit_by_name(limit_name(LIMIT_TAGS[name]), slots)

    def taken_slots(self) -> dict[str, int]:
        """Slots in use, by the documented names."""
        from flows.limits import LIMIT_TAGS, limit_name

        with self.client() as client:
            found = {limit.name: limit.active_slots for limit in client.read_global_concurrency_limits(limit=200)}
        return {name: found[limit_name(tag)] for name, tag in LIMIT_TAGS.items()}

    def add_dataset(self, dataset_id: str, files: Mapping[str, bytes] | int) -> dict[str, bytes]:
        """Uploads a dataset and lists it in the catalogue; a number: so many small files. Returns the files."""
        if isinstance(files, int):
            files = {f"frames/{index:05}.tif": random_bytes(1000 + index, index) for index in range(files)}
        upload(self.s3, self.landing_zone, files, dataset_id)
        self.control.seed_dataset(dataset_id, {path: len(body) for path, body in files.items()})
        return dict(files)

    def source_keys(self, dataset_id: str) -> list[str]:
        """Keys of the dataset's objects in the landing zone."""
        return object_keys(self.s3, self.landing_zone, raw_files_prefix(dataset_id))

    def job(self, job_id: str) -> dict[str, Any]:
        """The catalogue's job."""
        return dict(self.control.state.jobs[job_id])

    def flow_runs(self, name: str = "") -> list[FlowRun]:
        """The flow runs of this world that began, with ``name`` in theirs.

        Tests before it have left theirs on the server, and their schedules some that never begin.
        """
        ours = (run for run in self._all_flow_runs() if run.id not in self._runs_before)
        return [run for run in ours if run.start_time and name in run.name]

    def _all_flow_runs(self) -> list[FlowRun]:
        found: list[FlowRun] = []
        with self.client() as client:
            while page := client.read_flow_runs(limit=200, offset=len(found)):
                found.extend(page)
        return found


@pytest.fixture
def flow_world(
    tmp_path: Path,
    moto_server: S3Server,
    scicat_server: ScicatServer,
    prefect_server: PrefectServer,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[FlowWorld]:
    with ExitStack() as buckets:
        world = FlowWorld(
            tmp_path,
            moto_server,
            lambda: buckets.enter_context(fresh_bucket(moto_server)),
            scicat_server,
            prefect_server,
        )
        world.set_limits()
        for name, value in world.settings.items():
            monkeypatch.setenv(name, value)
        with prefect_server.client_settings():
            yield world


def until(look: Callable[[], T], timeout_s: float = 120.0, what: str = "") -> T:
    """The first true thing that ``look`` gives; the test fails when there is none in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            pytest.fail(f"nothing came of waiting {timeout_s:g} s for {what or look}")
        time.sleep(0.2)
