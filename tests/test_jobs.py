"""Jobs in an engine, with SciCat told: outcomes by whose fault it is, verdicts, and what a settled job leaves."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from mover.catalogue import JobDataset, Lifecycle
from mover.engine import Engine, EngineConfig
from mover.errors import (
    DatasetBusyError,
    JobFinishedError,
    JobMismatchError,
    JobNotFoundError,
    LtsError,
    MissingFilesError,
)
from mover.jobs import JobRunner
from mover.jobs_lifecycle import (
    DatasetOutcome,
    JobKind,
    OutcomeState,
    failure_outcome,
    job_verdict,
    outcome_lifecycle,
    started_lifecycle,
)
from mover.jobs_result import job_result
from mover.jobs_settle import SettlingEngine, settle_job, this_engine
from mover.reports import ByteCounters, RetrievedObject, RetrieveReport
from mover.scicat import SciCat, SciCatAccess
from mover.settings_rules import Secret
from tests.datasets import DATASET, fresh_buckets, make_config, open_engine, upload
from tests.engines import datablock_file
from tests.scicat_fake.server import ScicatServer
from tests.servers import S3Server

pytestmark = pytest.mark.anyio

FILES = {"a.tif": b"a" * 2000, "deep/b.tif": b"b" * 3000}
SIZES = {path: len(body) for path, body in FILES.items()}
OTHER = "20.500.11935/another"


@pytest.fixture
def config(tmp_path: Path, moto_server: S3Server) -> Iterator[EngineConfig]:
    with fresh_buckets(moto_server) as buckets:
        yield make_config(tmp_path, moto_server, buckets)


@pytest.fixture
def uploaded(config: EngineConfig, moto_server: S3Server, scicat_server: ScicatServer) -> None:
    """``DATASET`` with ``FILES``, ready to be archived."""
    upload(moto_server, config.buckets.landing_zone, FILES)
    scicat_server.control.seed_dataset(DATASET, SIZES)


@asynccontextmanager
async def _runner(config: EngineConfig, scicat: ScicatServer) -> AsyncIterator[tuple[JobRunner, SciCat]]:
    access = SciCatAccess(scicat.url, scicat.user, Secret(scicat.password))
    async with SciCat.open(access) as catalogue, Engine.open(config, catalogue=catalogue) as engine:
        yield JobRunner(engine, catalogue, patience_s=0.0), catalogue


@pytest.mark.usefixtures("uploaded")
async def test_a_dataset_is_started_archived_and_told_with_numbers(
    config: EngineConfig, scicat_server: ScicatServer
) -> None:
    control = scicat_server.control
    async with _runner(config, scicat_server) as (jobs, _):
        result = await jobs.archive(DATASET, release_source=True)
    assert result.outcome.state == "done"
    assert control.lifecycle_values(DATASET) == ["started", "datasetOnArchiveDisk"]
    lifecycle = control.lifecycle(DATASET)
    assert (lifecycle["archivable"], lifecycle["retrievable"]) == (False, True)
    assert lifecycle["archiveReturnMessage"]["files"] == len(FILES)
    assert len(control.datablocks(DATASET)) == 1


async def test_missing_files_are_the_owners_error_and_named_where_the_owner_looks(
    config: EngineConfig, moto_server: S3Server, scicat_server: ScicatServer
) -> None:
    control = scicat_server.control
    upload(moto_server, config.buckets.landing_zone, FILES)
    control.seed_dataset(DATASET, {**SIZES, "lost.tif": 5, "deep/b.tif": 4})
    async with _runner(config, scicat_server) as (jobs, _):
        result = await jobs.archive(DATASET, release_source=True)
    assert result.outcome.state == "user-error"
    lifecycle = control.lifecycle(DATASET)
    assert (lifecycle["archivable"], lifecycle["retrievable"]) == (True, False)
    assert lifecycle["archiveStatusMessage"] == "missingFilesError"
    assert lifecycle["archiveReturnMessage"]["missingFiles"] == ["lost.tif"]
    assert lifecycle["archiveReturnMessage"]["wrongSizeFiles"] == ["deep/b.tif"]
    assert control.datablocks(DATASET) == []


@pytest.mark.usefixtures("uploaded")
async def test_a_storage_that_refuses_is_the_facilitys_error(config: EngineConfig, scicat_server: ScicatServer) -> None:
    control = scicat_server.control
    (config.lts_root / "openem-network").write_text("a file where a folder has to be")
    async with _runner(config, scicat_server) as (jobs, _):
        result = await jobs.archive(DATASET, release_source=True)
    assert result.outcome.state == "system-error"
    lifecycle = control.lifecycle(DATASET)
    assert (lifecycle["archivable"], lifecycle["retrievable"]) == (False, False)
    assert lifecycle["archiveStatusMessage"] == "scheduleArchiveJobFailed"
    assert "the data is not at fault" in lifecycle["archiveReturnMessage"]["message"]


@pytest.mark.usefixtures("uploaded")
async def test_an_archived_dataset_stays_retrievable_when_a_later_job_fails(
    config: EngineConfig, moto_server: S3Server, scicat_server: ScicatServer
) -> None:
    control = scicat_server.control
    async with _runner(config, scicat_server) as (jobs, _):
        await jobs.archive(DATASET, release_source=False)
        upload(moto_server, config.buckets.landing_zone, {"new.tif": b"uploaded under the same name"})
        again = await jobs.archive(DATASET, release_source=False)
    assert again.outcome.state == "user-error"
    lifecycle = control.lifecycle(DATASET)
    assert (lifecycle["archivable"], lifecycle["retrievable"]) == (False, True)
    assert lifecycle["archiveStatusMessage"] == "datasetOnArchiveDisk"
    assert "new.tif" in lifecycle["archiveReturnMessage"]["message"]


@pytest.mark.parametrize(
    ("dead_run_before", "shown"),
    [(False, ["started", "datasetCreated"]), (True, ["scheduleArchiveJobFailed"])],
)
@pytest.mark.usefixtures("uploaded")
async def test_a_dataset_that_another_run_holds_is_left_to_that_run_and_never_at_work_for_nobody(
    config: EngineConfig, scicat_server: ScicatServer, shown: list[str], *, dead_run_before: bool
) -> None:
    control = scicat_server.control
    if dead_run_before:
        _seem_started(scicat_server, DATASET)
    async with open_engine(config) as other:
        folder = other._parts.folder(DATASET)  # noqa: SLF001 - holds what a second run meets
        folder.path.mkdir(parents=True)
        lock = folder.lock("another host")
        try:
            async with _runner(config, scicat_server) as (jobs, _):
                result = await jobs.archive(DATASET, release_source=True)
        finally:
            lock.release()
    assert result.outcome.state == "system-error"
    assert "another host" in result.outcome.message
    assert control.lifecycle_values(DATASET) == shown
    assert control.lifecycle(DATASET)["archivable"] is not dead_run_before


@pytest.mark.usefixtures("uploaded")
async def test_a_retrieval_of_an_unknown_file_is_the_owners_error_and_of_a_known_one_is_proved(
    config: EngineConfig, scicat_server: ScicatServer
) -> None:
    control = scicat_server.control
    async with _runner(config, scicat_server) as (jobs, _):
        await jobs.archive(DATASET, release_source=True)
        unknown = await jobs.retrieve(JobDataset(DATASET, ("nothing.tif",)))
        refused = control.lifecycle(DATASET)
        known = await jobs.retrieve(JobDataset(DATASET, ("a.tif",)))
    assert (unknown.outcome.state, known.outcome.state) == ("user-error", "done")
    assert refused["retrieveStatusMessage"] == "datasetRetrievalFailed"
    assert refused["retrieveIntegrityCheck"] is False
    assert control.lifecycle_values(DATASET, "retrieveStatusMessage")[-2:] == ["started", "datasetRetrieved"]
    assert control.lifecycle(DATASET)["retrieveIntegrityCheck"] is True


async def test_a_job_is_read_once_for_each_dataset_and_only_if_it_is_the_right_one(
    config: EngineConfig, scicat_server: ScicatServer
) -> None:
    control = scicat_server.control
    job_id = control.seed_job("archive", [DATASET, OTHER])
    ended = control.seed_job("archive", [DATASET], status="finishedSuccessful")
    async with _runner(config, scicat_server) as (jobs, _):
        assert await jobs.read(job_id, "archive") == (JobDataset(DATASET), JobDataset(OTHER))
        assert await jobs.read(job_id, "archive", [OTHER, OTHER]) == (JobDataset(OTHER),)
        with pytest.raises(JobMismatchError, match="'retrieve'"):
            await jobs.read(job_id, "retrieve")
        with pytest.raises(JobMismatchError, match="stranger"):
            await jobs.read(job_id, "archive", ["20.500/stranger"])
        with pytest.raises(JobFinishedError):
            await jobs.read(ended, "archive")
        assert await jobs.read(ended, "archive", again=True) == (JobDataset(DATASET),)
        with pytest.raises(JobNotFoundError):
            await jobs.read("no-such-job", "archive")


async def _settle(config: EngineConfig, scicat: ScicatServer, job_id: str, state: OutcomeState) -> str:
    access = SciCatAccess(scicat.url, scicat.user, Secret(scicat.password))
    async with SciCat.open(access) as catalogue, Engine.open(config, catalogue=catalogue) as engine:
        job = await catalogue.job(job_id)
        return await settle_job(this_engine(engine), catalogue, job, "archive", state, "it was killed")


def _seem_started(scicat: ScicatServer, dataset_id: str) -> None:
    lifecycle = scicat.control.state.datasets[dataset_id]["datasetlifecycle"]
    lifecycle.update(archivable=False, retrievable=False, archiveStatusMessage="started")


async def test_settling_takes_partial_registrations_back_and_leaves_untouched_datasets_alone(
    config: EngineConfig, moto_server: S3Server, scicat_server: ScicatServer
) -> None:
    control = scicat_server.control
    config = msgspec.structs.replace(config, target_bytes=2500)
    upload(moto_server, config.buckets.landing_zone, FILES)
    for dataset_id in (DATASET, OTHER):
        control.seed_dataset(dataset_id, SIZES)
    job_id = control.seed_job("archive", [DATASET, OTHER, "20.500.11935/deleted"])
    async with _runner(config, scicat_server) as (jobs, _):
        await jobs.archive(DATASET, release_source=False)
    datablock_file(config.lts_root, 2).with_name(f"{datablock_file(config.lts_root, 2).name}.manifest.json").unlink()
    _seem_started(scicat_server, DATASET)  # as after a kill in the middle

    code = await _settle(config, scicat_server, job_id, "system-error")

    assert code == "finishedUnsuccessful"
    assert control.datablocks(DATASET) == []
    assert control.lifecycle(DATASET)["archiveStatusMessage"] == "scheduleArchiveJobFailed"
    assert control.lifecycle(OTHER)["archivable"] is True
    assert control.lifecycle_values(OTHER) == []


@pytest.mark.parametrize("state", ["cancelled", "system-error"])
@pytest.mark.usefixtures("uploaded")
async def test_a_dataset_that_is_whole_on_the_lts_is_finished_rather_than_taken_back(
    config: EngineConfig, scicat_server: ScicatServer, state: OutcomeState
) -> None:
    control = scicat_server.control
    job_id = control.seed_job("archive", [DATASET])
    async with _runner(config, scicat_server) as (jobs, catalogue):
        await jobs.archive(DATASET, release_source=True)
        await catalogue.unregister_all(DATASET)
    _seem_started(scicat_server, DATASET)  # as after a kill while the source was released

    code = await _settle(config, scicat_server, job_id, state)

    assert code == "finishedSuccessful"
    assert len(control.datablocks(DATASET)) == 1
    assert control.lifecycle(DATASET)["retrievable"] is True


@pytest.mark.usefixtures("uploaded")
async def test_a_dataset_that_another_run_holds_is_not_settled_under_it(
    config: EngineConfig, scicat_server: ScicatServer
) -> None:
    control = scicat_server.control
    job_id = control.seed_job("archive", [DATASET])
    _seem_started(scicat_server, DATASET)
    async with open_engine(config) as other, other.holding(DATASET):
        with pytest.raises(DatasetBusyError):
            await _settle(config, scicat_server, job_id, "cancelled")
    assert control.lifecycle_values(DATASET) == []
    assert control.requests("DELETE") == []
    assert control.job_statuses(job_id) == ["jobSubmitted"]  # the reconciler comes back to it


async def test_a_dataset_whose_datablocks_cannot_be_taken_back_still_shows_no_work_in_progress(
    config: EngineConfig, scicat_server: ScicatServer
) -> None:
    control = scicat_server.control
    control.seed_dataset(DATASET, SIZES)
    control.fail("DELETE", "datablocks", 403, times=-1)  # an account that may not delete
    job_id = control.seed_job("archive", [DATASET])
    _seem_started(scicat_server, DATASET)

    code = await _settle(config, scicat_server, job_id, "cancelled")

    assert code == "finishedUnsuccessful"
    lifecycle = control.lifecycle(DATASET)
    assert lifecycle["archiveStatusMessage"] == "scheduleArchiveJobFailed"
    assert "403" in lifecycle["archiveReturnMessage"]["message"]


@pytest.mark.usefixtures("uploaded")
async def test_a_dataset_that_is_whole_but_was_uploaded_anew_is_told_as_that(
    config: EngineConfig, moto_server: S3Server, scicat_server: ScicatServer
) -> None:
    control = scicat_server.control
    job_id = control.seed_job("archive", [DATASET])
    async with _runner(config, scicat_server) as (jobs, _):
        await jobs.archive(DATASET, release_source=False)
    upload(moto_server, config.buckets.landing_zone, {"new.tif": b"uploaded under the same name"})
    _seem_started(scicat_server, DATASET)

    code = await _settle(config, scicat_server, job_id, "system-error")

    assert code == "finishedWithDatasetErrors"
    lifecycle = control.lifecycle(DATASET)
    assert (lifecycle["archivable"], lifecycle["archiveStatusMessage"]) == (True, "missingFilesError")
    assert "new.tif" in lifecycle["archiveReturnMessage"]["message"]


@asynccontextmanager
async def _no_engine() -> AsyncIterator[SettlingEngine]:
    raise LtsError("probe", "/lts", "no answer")
    yield  # type: ignore[unreachable]  # a context manager


@pytest.mark.parametrize(("kind", "started"), [("retrieve", True), ("archive", False)])
async def test_what_needs_no_engine_is_settled_without_the_lts(
    scicat_server: ScicatServer, kind: JobKind, *, started: bool
) -> None:
    control = scicat_server.control
    control.seed_dataset(DATASET, SIZES)
    if started:
        control.state.datasets[DATASET]["datasetlifecycle"].update(retrieveStatusMessage="started")
    job_id = control.seed_job(kind, [DATASET])
    access = SciCatAccess(scicat_server.url, scicat_server.user, Secret(scicat_server.password))
    async with SciCat.open(access) as catalogue:
        job = await catalogue.job(job_id)
        code = await settle_job(_no_engine, catalogue, job, kind, "system-error", "its runs were killed")
    assert code == "finishedUnsuccessful"
    if started:
        assert control.lifecycle(DATASET)["retrieveStatusMessage"] == "scheduleRetrieveJobFailed"


@pytest.mark.usefixtures("uploaded")
async def test_a_second_run_does_not_write_to_a_dataset_that_shows_work_in_progress(
    config: EngineConfig, scicat_server: ScicatServer
) -> None:
    _seem_started(scicat_server, DATASET)  # by a run that may be registering datablocks this moment
    async with _runner(config, scicat_server) as (jobs, _):
        assert (await jobs.archive(DATASET, release_source=True)).outcome.state == "done"
    assert scicat_server.control.lifecycle_values(DATASET) == ["datasetOnArchiveDisk"]


async def test_a_second_run_that_fails_takes_nothing_back_of_what_was_archived_before(
    config: EngineConfig, moto_server: S3Server, scicat_server: ScicatServer
) -> None:
    control = scicat_server.control
    config = msgspec.structs.replace(config, target_bytes=2500)
    upload(moto_server, config.buckets.landing_zone, FILES)
    control.seed_dataset(DATASET, SIZES)
    async with _runner(config, scicat_server) as (jobs, _):
        await jobs.archive(DATASET, release_source=True)
        stored = control.datablocks(DATASET)
        stored[1]["size"] = 1  # somebody changed it: the registration of the second one is refused
        again = await jobs.archive(DATASET, release_source=True)
    assert again.outcome.state == "system-error"
    assert len(control.datablocks(DATASET)) == len(stored) == 2
    assert control.lifecycle(DATASET)["retrievable"] is True


async def test_a_dataset_that_the_account_may_not_read_ends_as_the_facilitys_error(
    config: EngineConfig, scicat_server: ScicatServer
) -> None:
    scicat_server.control.fail("GET", "datasetlifecycle", 403, times=-1)
    scicat_server.control.seed_dataset(DATASET, SIZES)
    async with _runner(config, scicat_server) as (jobs, _):
        refused = await jobs.archive(DATASET, release_source=True)
        malformed = await jobs.archive("20.5/../x", release_source=True)
    assert refused.outcome.state == "system-error"
    assert malformed.outcome.state == "user-error"


async def test_a_job_that_another_run_has_ended_is_not_ended_again(
    config: EngineConfig, scicat_server: ScicatServer
) -> None:
    job_id = scicat_server.control.seed_job("archive", [DATASET], status="finishedSuccessful")
    broken = DatasetOutcome(DATASET, "system-error", "the second of two runs")
    async with _runner(config, scicat_server) as (jobs, _):
        assert await jobs.finish(job_id, "archive", [broken], {}) == "finishedSuccessful"
        assert scicat_server.control.job_statuses(job_id) == ["finishedSuccessful"]
        assert await jobs.finish(job_id, "archive", [broken], {}, again=True) == "finishedUnsuccessful"


def test_the_gravest_outcome_decides_the_job_and_every_failure_is_named() -> None:
    done = DatasetOutcome("20.5/done", "done", "fine")
    mistake = DatasetOutcome("20.5/mistake", "user-error", "two files are missing")
    broken = DatasetOutcome("20.5/broken", "system-error", "no space")
    assert job_verdict("archive", [done, done])[0] == "finishedSuccessful"
    assert job_verdict("archive", [done, mistake])[0] == "finishedWithDatasetErrors"
    code, message = job_verdict("retrieve", [done, mistake, broken])
    assert code == "finishedUnsuccessful"
    assert message == "1 of 3 dataset(s) retrieved; 20.5/mistake: two files are missing; 20.5/broken: no space"


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (MissingFilesError(DATASET, ["x"]), "user-error"),
        (LtsError("write", "/lts", "no space"), "system-error"),
    ],
)
def test_whose_fault_it_is_follows_from_the_error(error: MissingFilesError | LtsError, state: str) -> None:
    assert failure_outcome(DATASET, error).state == state


def test_a_cancelled_archival_can_be_ordered_again_and_says_so() -> None:
    outcome = DatasetOutcome(DATASET, "cancelled", "by an administrator")
    change = outcome_lifecycle("archive", Lifecycle(retrievable=False), outcome)
    assert (change.archivable, change.retrievable, change.archive_status_message) == (True, False, "datasetCreated")


def test_a_retrieval_under_way_claims_nothing_of_what_an_earlier_one_proved() -> None:
    before = Lifecycle(retrievable=True, retrieve_integrity_check=True)
    assert started_lifecycle("retrieve", before).retrieve_integrity_check is False


def test_nothing_that_is_archived_looks_like_work_in_progress() -> None:
    change = started_lifecycle("archive", Lifecycle(archivable=False, retrievable=True))
    assert (change.archivable, change.retrievable, change.archive_status_message) == (None, None, None)


def _report(dataset_id: str, objects: int, link_bytes: int, script: str = "#!/bin/sh\n") -> RetrieveReport:
    links = tuple(
        RetrievedObject(f"k/{index}.tar", 1, "xxh3_128:0", "0", "u" * link_bytes, "written") for index in range(objects)
    )
    return RetrieveReport(dataset_id, "datablocks", links, ByteCounters(), 1.0, "2030-01-01T00:00:00Z", script)


def test_the_result_of_a_retrieval_has_a_row_for_every_link_and_the_script() -> None:
    result = job_result([DatasetOutcome(DATASET, "done", "fine")], [_report(DATASET, 3, 100)])
    assert [row["name"] for row in result["result"]] == ["0.tar", "1.tar", "2.tar"]
    assert {"datasetId", "name", "size", "url", "archiveId"} == set(result["result"][0])
    assert base64.b64decode(result["downloadScript"][DATASET]) == b"#!/bin/sh\n"
    assert result["linksLeftOut"] == 0


def test_links_that_the_catalogue_cannot_hold_are_counted_not_sent() -> None:
    result = job_result([], [_report(DATASET, 9000, 1000)])
    assert len(result["result"]) + result["linksLeftOut"] == 9000
    assert result["linksLeftOut"] > 0
