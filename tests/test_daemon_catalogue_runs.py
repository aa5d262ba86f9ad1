"""Jobs of the catalogue in the daemon: what SciCat shows when they end, are cancelled, or outlive a restart."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from mover.api import DatasetView, is_final
from mover.daemon_book import Item
from mover.daemon_jobs import JobService
from mover.daemon_runner import Result
from mover.daemon_store import Pending
from mover.engine import EngineConfig
from mover.errors import CatalogueTransientError
from mover.policies.retry import RetryPolicy
from mover.scicat import SciCat, SciCatAccess
from mover.settings_rules import Secret
from tests.datasets import DATASET, make_config, upload
from tests.job_services import QUICK, ended, open_service, order, service_config, until
from tests.scicat_fake.server import ScicatServer
from tests.servers import S3Server, fresh_bucket

pytestmark = pytest.mark.anyio

FILES = {"a.tif": b"a" * 2000, "deep/b.tif": b"b" * 3000}
OTHER = "20.500.11935/another"


@pytest.fixture
def config(tmp_path: Path, moto_server: S3Server, scicat_server: ScicatServer) -> Iterator[EngineConfig]:
    with fresh_bucket(moto_server) as one, fresh_bucket(moto_server) as two, fresh_bucket(moto_server) as three:
        names = iter((one, two, three))
        made = make_config(tmp_path, moto_server, lambda: next(names))
        for dataset_id in (DATASET, OTHER):
            upload(moto_server, one, FILES, dataset_id)
            scicat_server.control.seed_dataset(dataset_id, {path: len(body) for path, body in FILES.items()})
        yield made


@asynccontextmanager
async def service_of(
    config: EngineConfig, scicat: ScicatServer, retry: RetryPolicy = QUICK
) -> AsyncIterator[JobService]:
    access = SciCatAccess(scicat.url, scicat.user, Secret(scicat.password))
    jobs = service_config(config.scratch_folder, retry=retry)
    async with SciCat.open(access) as catalogue, open_service(config, jobs, catalogue=catalogue) as service:
        yield service


async def _until_waiting(service: JobService, job_id: str) -> DatasetView:
    with anyio.fail_after(20):
        while (dataset := (await service.job(job_id)).datasets[0]).state != "waiting":  # noqa: ASYNC110 - the journal knows
            await anyio.sleep(0.01)
    return dataset


def _ends(scicat: ScicatServer, job_id: str) -> list[str]:
    return [status for status in scicat.control.job_statuses(job_id) if status.startswith("finished")]


async def test_the_catalogue_sees_a_job_begin_its_datasets_and_its_end(
    config: EngineConfig, scicat_server: ScicatServer
) -> None:
    control = scicat_server.control
    archival = control.seed_job("archive", [DATASET, OTHER])
    async with service_of(config, scicat_server) as service:
        job, _ = await service.submit(order(DATASET, OTHER), owner="scicat", catalogue_job=archival)
        done = await ended(service, job.id)
        shown = (done, control.state.jobs[archival])
        assert (done.state, done.reason) == ("done", "the catalogue shows finishedSuccessful"), shown
        assert control.job_statuses(archival)[-2:] == ["inProgress", "finishedSuccessful"]
        assert control.lifecycle(DATASET)["retrievable"] is True
        retrieval = control.seed_job("retrieve", [DATASET])
        job, _ = await service.submit(order(DATASET, kind="retrieve"), owner="scicat", catalogue_job=retrieval)
        assert (await ended(service, job.id)).state == "done"
        again, _ = await service.submit(order(DATASET, kind="retrieve"), owner="scicat", catalogue_job=retrieval)
        late = await ended(service, again.id)
        assert late.datasets[0].failure is not None
        assert late.datasets[0].failure.kind == "JobFinishedError"
    assert control.job_statuses(retrieval)[-1] == "finishedSuccessful"


async def test_the_job_ends_in_the_catalogue_once_the_end_of_each_dataset_is_durable(
    config: EngineConfig, scicat_server: ScicatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = scicat_server.control
    archival = control.seed_job("archive", [DATASET, OTHER])
    monkeypatch.setattr("mover.daemon_store._BATCH", 1)
    ends = 0
    async with service_of(config, scicat_server) as service:
        jobs, real = service._ledger.jobs, service._store._commit  # noqa: SLF001 - a journal that is slow at the end

        def slow(batch: list[Pending]) -> None:
            nonlocal ends
            changes = getattr(batch[0].step, "keywords", {}).get("changes")
            if changes is not None and any(is_final(item.state) for item in changes.items):
                ends += 1
                while jobs[changes.job_id].items:  # the first end is durable after the second one is known
                    time.sleep(0.01)
                if ends > 1:
                    time.sleep(0.5)
            real(batch)

        monkeypatch.setattr(service._store, "_commit", slow)  # noqa: SLF001
        job, _ = await service.submit(order(DATASET, OTHER), owner="scicat", catalogue_job=archival)
        done = await ended(service, job.id)
    assert ends == 2
    assert (done.state, done.reason) == ("done", "the catalogue shows finishedSuccessful")
    assert control.lifecycle(OTHER)["retrievable"] is True


async def test_a_job_whose_end_cannot_be_told_by_a_defect_ends_and_others_go_on(
    config: EngineConfig, scicat_server: ScicatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mover.daemon_catalogue_runs import CatalogueRunner

    async def broken(*_: object) -> str:
        raise KeyError("surprise")

    monkeypatch.setattr(CatalogueRunner, "_finish", broken)
    archival = scicat_server.control.seed_job("archive", [DATASET])
    async with service_of(config, scicat_server) as service:
        job, _ = await service.submit(order(DATASET), owner="scicat", catalogue_job=archival)
        assert "KeyError, a defect" in (await ended(service, job.id)).reason
        other, _ = await service.submit(order(DATASET, kind="verify"), owner="ann")
        assert (await ended(service, other.id)).state == "done"


@pytest.mark.slow
async def test_a_failed_dataset_is_told_with_its_error_and_the_job_with_its_verdict(
    config: EngineConfig, moto_server: S3Server, scicat_server: ScicatServer
) -> None:
    control = scicat_server.control
    upload(moto_server, config.buckets.landing_zone, FILES, "20.500/short")
    control.seed_dataset("20.500/short", {**{path: len(body) for path, body in FILES.items()}, "lost": 5})
    archival = control.seed_job("archive", [DATASET, "20.500/short"])
    async with service_of(config, scicat_server) as service:
        job, _ = await service.submit(order(DATASET, "20.500/short"), owner="scicat", catalogue_job=archival)
        done = await ended(service, job.id)
    assert [dataset.state for dataset in done.datasets] == ["done", "failed"]
    failure = done.datasets[1].failure
    assert failure is not None
    assert (failure.kind, failure.fault) == ("MissingFilesError", "user")
    assert control.job_statuses(archival)[-1] == "finishedWithDatasetErrors"


async def test_a_share_that_is_away_for_now_is_waited_for_over_a_restart_and_the_catalogue_shows_work_meanwhile(
    config: EngineConfig, scicat_server: ScicatServer
) -> None:
    control = scicat_server.control
    archival = control.seed_job("archive", [DATASET])
    away = config.lts_root.with_name("away")
    patient = RetryPolicy(attempts=100, base_s=0.5, cap_s=0.5)
    async with service_of(config, scicat_server, patient) as service:
        config.lts_root.rename(away)
        job, _ = await service.submit(order(DATASET), owner="scicat", catalogue_job=archival)
        dataset = await _until_waiting(service, job.id)
        assert "is the share mounted?" in dataset.reason
        assert dataset.retry_at
        assert control.job_statuses(archival)[-1] == "inProgress"
    away.rename(config.lts_root)
    async with service_of(config, scicat_server, patient) as service:
        done = await ended(service, job.id)
    assert (done.state, done.reason) == ("done", "the catalogue shows finishedSuccessful")
    assert done.datasets[0].attempt > 1
    assert _ends(scicat_server, archival) == ["finishedSuccessful"]
    assert "scheduleArchiveJobFailed" not in control.lifecycle_values(DATASET)


async def test_a_failure_that_outlasts_all_tries_is_told_to_the_catalogue_once(
    config: EngineConfig, scicat_server: ScicatServer
) -> None:
    control = scicat_server.control
    archival = control.seed_job("archive", [DATASET])
    async with service_of(config, scicat_server) as service:
        config.lts_root.rename(config.lts_root.with_name("away"))
        job, _ = await service.submit(order(DATASET), owner="scicat", catalogue_job=archival)
        done = await ended(service, job.id)
    failure = done.datasets[0].failure
    assert failure is not None
    assert (done.datasets[0].state, done.datasets[0].attempt, failure.kind) == ("failed", 3, "MissingMountError")
    assert _ends(scicat_server, archival) == ["finishedUnsuccessful"]
    assert control.lifecycle_values(DATASET).count("scheduleArchiveJobFailed") == 1


async def test_a_cancelled_job_leaves_no_dataset_in_progress(config: EngineConfig, scicat_server: ScicatServer) -> None:
    control = scicat_server.control
    archival = control.seed_job("archive", [DATASET, OTHER])
    async with service_of(config, scicat_server) as service:
        limits = service._engine._parts.limits  # noqa: SLF001 - keeps both datasets from moving
        async with limits.move_to_lts.slot("x_1.tar"), limits.move_to_lts.slot("y_1.tar"):
            job, _ = await service.submit(order(DATASET, OTHER), owner="scicat", catalogue_job=archival)
            await until(lambda: control.lifecycle(DATASET)["archiveStatusMessage"] == "started")
            await service.cancel(job.id, who="ann")
            done = await ended(service, job.id)
    assert (done.state, done.reason) == ("cancelled", "cancelled by ann; the catalogue shows finishedUnsuccessful")
    assert control.job_statuses(archival)[-1] == "finishedUnsuccessful"
    assert control.lifecycle(DATASET)["archivable"] is True
    assert control.lifecycle(DATASET)["archiveStatusMessage"] == "datasetCreated"


@pytest.mark.slow
async def test_the_end_of_a_job_that_the_catalogue_missed_is_told_after_a_restart(
    config: EngineConfig, scicat_server: ScicatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mover.daemon_catalogue_runs import CatalogueRunner

    control = scicat_server.control
    archival = control.seed_job("archive", [DATASET])
    real = CatalogueRunner._finish  # noqa: SLF001 - the last request of the job fails

    async def away(*_: object) -> str:
        raise CatalogueTransientError("PATCH", "jobs", "away")

    monkeypatch.setattr(CatalogueRunner, "_finish", away)
    async with service_of(config, scicat_server) as service:
        job, _ = await service.submit(order(DATASET), owner="scicat", catalogue_job=archival)
        with anyio.fail_after(20):
            async for event in service.events(job.id):
                if event.transition is not None and event.transition.reason.startswith("waits for the catalogue"):
                    break
        waiting = await service.job(job.id)
        assert (waiting.state, waiting.datasets[0].state) == ("running", "done")
        assert control.job_statuses(archival)[-1] == "inProgress"
    monkeypatch.setattr(CatalogueRunner, "_finish", real)
    ran: list[Item] = []

    async def not_again(_self: object, item: Item) -> Result:
        ran.append(item)
        return Result()

    monkeypatch.setattr(CatalogueRunner, "run", not_again)
    async with service_of(config, scicat_server) as service:
        assert (await ended(service, job.id)).state == "done"
    assert control.job_statuses(archival)[-1] == "finishedSuccessful"
    assert ran == []
