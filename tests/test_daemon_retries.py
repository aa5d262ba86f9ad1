"""What is tried again and for how long: failures without work between them that stays done use up the tries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mover.daemon_book import Item
from mover.engine import EngineConfig
from mover.errors import LtsError, NotEnoughSpaceError
from mover.model import Progress, Stage
from tests.datasets import DATASET, fresh_buckets, make_config, random_bytes, upload
from tests.job_services import Steered, ended, open_service, order
from tests.servers import S3Server

pytestmark = pytest.mark.anyio

FILES = {"a": random_bytes(5_000, 1), "b/c": random_bytes(70_000, 2)}


@pytest.fixture
def config(tmp_path: Path, moto_server: S3Server) -> Iterator[EngineConfig]:
    with fresh_buckets(moto_server) as buckets:
        upload(moto_server, buckets.landing_zone, FILES, DATASET)
        yield make_config(tmp_path, moto_server, buckets)


class _GetsOn:
    """Fails every time, after a stage of a datablock was finished: of the same one, or of the next each time."""

    def __init__(self, stage: Stage, datablocks: int) -> None:
        self._stage, self._datablocks = stage, datablocks

    def __call__(self, item: Item, attempt: int) -> Exception:
        assert item.live is not None
        done = Progress(item.dataset_id, self._stage, "finished", min(attempt, self._datablocks), 10, 10)
        item.live.tell(done)
        return LtsError("read", "/lts/x_9.tar", "EIO")


@pytest.mark.parametrize(
    ("kind", "stage", "datablocks", "attempts"),
    [
        ("verify", Stage.VERIFY, 1, 3),
        ("verify", Stage.VERIFY, 100, 3),  # every attempt reads all of them again
        ("archive", Stage.VERIFY, 1, 3),
        ("archive", Stage.MOVE, 1, 3),
        ("archive", Stage.MOVE, 6, 8),  # 6 that are done for good, and 2 more that bring nothing
        ("archive", Stage.VERIFY, 6, 8),
        ("archive", Stage.STAGE, 6, 8),
        ("retrieve", Stage.RETRIEVE, 6, 8),
        ("retrieve", Stage.RECALL, 100, 3),
    ],
)
async def test_only_work_that_stays_done_gives_a_dataset_its_tries_back(
    config: EngineConfig, kind: str, stage: Stage, datablocks: int, attempts: int
) -> None:
    gets_on = _GetsOn(stage, datablocks)
    async with open_service(config, steer=lambda engine: Steered(engine, gets_on)) as service:
        job, _ = await service.submit(order(DATASET, kind=kind), owner="ann")  # type: ignore[arg-type]
        (dataset,) = (await ended(service, job.id)).datasets
    assert (dataset.state, dataset.attempt) == ("failed", attempts)


async def test_a_proof_from_tape_of_what_is_on_disk_is_not_tried_again(config: EngineConfig) -> None:
    async with open_service(config) as service:
        job, _ = await service.submit(order(DATASET), owner="ann")
        assert (await ended(service, job.id)).state == "done"
        job, _ = await service.submit(order(DATASET, kind="verify", level="recalled"), owner="ann")
        (dataset,) = (await ended(service, job.id)).datasets
    assert dataset.failure is not None
    assert (dataset.state, dataset.attempt, dataset.failure.kind) == ("failed", 1, "NotRecalledError")
    assert "proves nothing about the tape" in dataset.failure.message


async def test_a_dataset_that_found_no_space_for_as_long_as_it_may_wait_has_failed(config: EngineConfig) -> None:
    def fail(_item: Item, _attempt: int) -> Exception:
        return NotEnoughSpaceError(9, 1, 0, 1, 86_400.0)

    async with open_service(config, steer=lambda engine: Steered(engine, fail)) as service:
        job, _ = await service.submit(order(DATASET), owner="ann")
        done = await ended(service, job.id)
    failure = done.datasets[0].failure
    assert failure is not None
    assert (done.state, failure.exit_code, done.datasets[0].attempt) == ("failed", 5, 1)
