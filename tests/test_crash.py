"""Killed at any instant, the same command again ends in the same final state, and fetches nothing that was durable."""

from __future__ import annotations

import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import xxhash

from mover.model import WINDOW_BYTES, raw_object_key
from tests.crash import Durable, Kennel, Run, Scene, digest_of, make_files, open_kennel
from tests.crash_child import Point
from tests.faults import Rule, StallReply
from tests.servers import S3Server, fresh_bucket, put_objects, s3_client

if TYPE_CHECKING:
    from types_boto3_s3.type_defs import CompletedPartTypeDef

_MIB = 1 << 20
_DATASET = "20.500.11935/crash"
_SYSTEM_ERROR, _INTERRUPTED = 1, 130


@pytest.fixture(scope="module")
def kennel() -> Iterator[Kennel]:
    with open_kennel() as kennel:
        yield kennel


@pytest.fixture(scope="module")
def memory_folder() -> Iterator[Path]:
    """The tests write many times what they archive: not to a disk where there is memory."""
    parent = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="mover-test-crash-", dir=parent) as folder:
        yield Path(folder)


@contextmanager
def _scene(kennel: Kennel, server: S3Server, bucket: str, folder: Path, files: Mapping[str, bytes]) -> Iterator[Scene]:
    put_objects(server, bucket, {raw_object_key(_DATASET, path): body for path, body in files.items()})
    digests = {path: digest_of(body) for path, body in files.items()}
    root = Path(tempfile.mkdtemp(dir=folder))
    try:
        yield Scene(kennel, server, bucket, _DATASET, digests, root)
    finally:
        shutil.rmtree(root)


# ------------------------------------------------------------------------------------------------- random moments
@pytest.fixture(scope="module")
def mixed(kennel: Kennel, rgw_server: S3Server, memory_folder: Path) -> Iterator[Scene]:
    """200 files: empty ones, tiny ones, 100 kB, some above 4 MiB, and one of 300 MiB; several datablocks."""
    rng = random.Random(7)
    sizes = [0] * 20 + [rng.randrange(1, 2000) for _ in range(70)] + [100_000] * 100
    sizes += [rng.randrange(4 * _MIB, 8 * _MIB) for _ in range(9)] + [300 * _MIB + 1]
    rng.shuffle(sizes)
    with (
        fresh_bucket(rgw_server) as bucket,
        _scene(kennel, rgw_server, bucket, memory_folder, make_files(rng, sizes)) as scene,
    ):
        yield scene


def _kill_at_random(scene: Scene, rng: random.Random, longest_s: float) -> tuple[Run, Durable] | None:
    """A run that is killed, and what was durable then; None when it was quicker."""
    with scene.running() as run:
        run.ends_within(rng.uniform(0, longest_s))
        code = run.kill()
    return (run, scene.durable()) if code == -signal.SIGKILL else None


def _archive_with_kills(scene: Scene, rng: random.Random, longest_s: float) -> list[int]:
    """One archive from its beginning to its end with one kill or more; durable windows at each kill."""
    scene.reset()
    kills: list[Durable] = []
    runs: list[Run] = []
    while not kills or rng.random() < 0.3:
        killed = _kill_at_random(scene, rng, longest_s)
        if killed is None:
            if not kills:
                scene.reset()
                continue
            break
        runs.append(killed[0])
        kills.append(killed[1])
    runs.append(scene.finish())
    scene.assert_archived()
    manifests = scene.manifests()
    for number, durable in enumerate(kills):
        for run in runs[number + 1 :]:
            assert durable.fetched_again(manifests, run.requests) == []
    return [len(durable.windows) for durable in kills]


def _kill_often(scene: Scene, count: int, longest_s: float | None = None) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")  # noqa: T201 - shown when it fails
    rng = random.Random(seed)
    if longest_s is None:
        scene.reset()
        began = time.monotonic()
        scene.finish()
        longest_s = time.monotonic() - began
    durable: list[int] = []
    while len(durable) < count:
        durable += _archive_with_kills(scene, rng, longest_s)
    print(f"durable windows at {len(durable)} kills: {durable}")  # noqa: T201
    assert sum(map(bool, durable)) > len(durable) // 4  # else nothing was shown about them


def test_after_kills_at_random_moments_the_archive_is_whole_and_no_durable_window_is_fetched_again(
    mixed: Scene,
) -> None:
    _kill_often(mixed, 5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_after_fifty_kills_at_random_moments_the_archive_is_whole(mixed: Scene) -> None:
    _kill_often(mixed, 50)


# -------------------------------------------------------------------------------------------------- every boundary
@pytest.fixture
def small(kennel: Kennel, moto_server: S3Server, memory_folder: Path) -> Iterator[Scene]:
    """A dozen files in three datablocks; small enough to be uploaded for every test."""
    yield from _small(kennel, moto_server, memory_folder)


@pytest.fixture
def small_on_rgw(kennel: Kennel, rgw_server: S3Server, memory_folder: Path) -> Iterator[Scene]:
    yield from _small(kennel, rgw_server, memory_folder)


def _small(kennel: Kennel, server: S3Server, folder: Path) -> Iterator[Scene]:
    rng = random.Random(11)
    files = make_files(rng, [0, 10, 100_000, 700_000, 5 * _MIB, 600_000, 1, 0, 300_000, 200_000, 900_000, 4000])
    with (
        fresh_bucket(server) as bucket,
        _scene(kennel, server, bucket, folder, files) as scene,
    ):
        scene.settings["ARCHIVER_TARGET_SIZE_MB"] = "2"
        yield scene


_RENAME = ("mover.streams.durable", "rename_file")
_ENDS = {"datablock": ".tar", "manifest": ".manifest.json"}
_POINTS = {
    "planned, nothing written": Point("mover.archive", "_archive_datablocks"),
    "file made, journal not begun": Point("mover.journal:DatablockJournal", "begin"),
    "journal begun": Point("mover.journal:DatablockJournal", "begin", "after", call=2),
    "bytes durable, journal without them": Point("mover.journal:DatablockJournal", "add_windows"),
    "line of the journal torn": Point("mover.journal", "append_durably", "half", call=4),
    "windows in the journal": Point("mover.journal:DatablockJournal", "add_windows", "after"),
    "datablock complete, not renamed": Point(*_RENAME, about=_ENDS["datablock"]),
    "datablock renamed, folder not synced": Point(*_RENAME, "after", about=_ENDS["datablock"]),
    "second datablock renamed": Point(*_RENAME, "after", call=2, about=_ENDS["datablock"]),
    "datablock committed": Point("mover.streams.lts_writer:LtsWriter", "commit", "after"),
    "read back, no manifest": Point("mover.streams.lts:LtsFolder", "write_manifest"),
    "manifest without its name": Point(*_RENAME, about=_ENDS["manifest"]),
    "manifest named, folder not synced": Point(*_RENAME, "after", about=_ENDS["manifest"]),
    "last manifest written": Point("mover.streams.lts:LtsFolder", "write_manifest", "after", call=3),
    "half of the datablocks registered": Point("mover.catalogue:NoCatalogue", "register", "after", call=2),
    "before the release": Point("mover.archive", "release_source"),
    "half of the source released": Point("mover.streams.s3:S3Store", "delete", "half", half_of=2),
    "released, journal still there": Point("mover.journal:Journal", "forget"),
    "all done": Point("mover.journal:Journal", "forget", "after"),
}
_BEFORE_RELEASE = list(_POINTS)[: list(_POINTS).index("half of the source released")]


_TELLING = (
    "line of the journal torn",
    "windows in the journal",
    "datablock renamed, folder not synced",
    "manifest named, folder not synced",
    "before the release",
    "half of the source released",
)


@pytest.mark.parametrize("step", _TELLING)
def test_a_kill_at_a_step_boundary_ends_in_the_same_state_with_the_source_deleted_only_when_proved(
    small: Scene, step: str
) -> None:
    _kill_at(small, step)


@pytest.mark.slow
@pytest.mark.parametrize("step", _POINTS)
def test_a_kill_at_any_step_boundary_ends_in_the_same_state(small_on_rgw: Scene, step: str) -> None:
    _kill_at(small_on_rgw, step)


def _kill_at(small: Scene, step: str) -> None:
    source = small.source_paths()
    with small.running("--release-source", point=_POINTS[step]) as run:
        assert run.wait() == -signal.SIGKILL, run.stderr
    durable, left = small.durable(), small.source_paths()
    archived = {member.path for manifest in small.manifests() for member in manifest.members}
    assert archived >= set(source) - set(left)
    if step in _BEFORE_RELEASE:
        assert left == source
    elif step == "half of the source released":
        assert len(left) == len(source) // 2

    again = small.finish("--release-source")

    small.assert_archived()
    assert durable.fetched_again(small.manifests(), again.requests) == []
    assert small.source_paths() == []


# ------------------------------------------------------------------------------------- journal, neighbours, signals
def test_without_its_journal_a_killed_run_costs_work_and_nothing_else(small: Scene) -> None:
    with small.running(point=_POINTS["windows in the journal"]) as run:
        assert run.wait() == -signal.SIGKILL
    assert small.durable().windows
    shutil.rmtree(small.scratch / "journal")

    again = small.finish()

    small.assert_archived()
    counters = again.document["datasets"][0]["counters"]
    assert counters["reused_bytes"] == 0
    assert counters["landing_zone_read_bytes"] == sum(
        member.size_bytes for manifest in small.manifests() for member in manifest.members
    )


def test_a_second_process_is_refused_and_changes_nothing_until_the_first_is_killed(small: Scene) -> None:
    small.settings["ARCHIVER_TARGET_SIZE_MB"] = "64"  # one datablock: nothing is renamed while the first one waits
    with small.running(rules=[Rule(StallReply(100), method="GET", target="file-0004")]) as first:
        first.wait_until(lambda: any(item.fault for item in first.proxy.seen))
        before = _snapshot(small)
        with small.running() as second:
            assert second.wait() == _SYSTEM_ERROR
            assert second.document["error"]["kind"] == "DatasetBusyError"
            assert second.requests.ranges == []
        assert _snapshot(small) == before
        assert first.kill() == -signal.SIGKILL

    small.finish()

    small.assert_archived()


def _snapshot(scene: Scene) -> set[tuple[str, int]]:
    """Names of all files and their inodes; the first run still fills them."""
    return {(str(path), path.stat().st_ino) for path in [*scene.lts.rglob("*"), *scene.scratch.rglob("*")]}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_makes_durable_what_it_has_and_fetches_none_of_it_again(
    small: Scene, number: signal.Signals
) -> None:
    small.settings["ARCHIVER_TARGET_SIZE_MB"] = "64"  # one datablock: nothing of it is committed
    received = Point("mover.streams.pipe:_Checkpoints", "add", "after", signal=number)
    stalled = Rule(StallReply(100), method="GET", target="file-0004")
    with small.running(point=received, rules=[stalled]) as run:
        assert run.wait() == _INTERRUPTED, run.stderr
    durable = small.durable()
    assert durable.windows
    assert not durable.committed

    again = small.finish()

    small.assert_archived()
    assert durable.fetched_again(small.manifests(), again.requests) == []


# -------------------------------------------------------------------------------------------------- one large object
def _one_large(kennel: Kennel, server: S3Server, folder: Path, size_bytes: int) -> Iterator[Scene]:
    """A single object whose windows all differ; neither it nor its datablock is ever held in this process."""
    pattern, digest = random.Random(3).randbytes(8 * _MIB) * 8, xxhash.xxh3_128()
    with fresh_bucket(server) as bucket, s3_client(server) as client:
        key = raw_object_key(_DATASET, "movie.tiff")
        upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
        parts: list[CompletedPartTypeDef] = []
        for number in range(1, -(-size_bytes // WINDOW_BYTES) + 1):
            length = min(WINDOW_BYTES, size_bytes - (number - 1) * WINDOW_BYTES)
            body = number.to_bytes(8, "big") + pattern[8:length]
            digest.update(body)
            reply = client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=body)
            parts.append({"ETag": reply["ETag"], "PartNumber": number})
        client.complete_multipart_upload(Bucket=bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts})
        root = Path(tempfile.mkdtemp(dir=folder))
        try:
            yield Scene(kennel, server, bucket, _DATASET, {"movie.tiff": digest.hexdigest()}, root)
        finally:
            shutil.rmtree(root)


@pytest.fixture
def four_gib(kennel: Kennel, rgw_server: S3Server, memory_folder: Path) -> Iterator[Scene]:
    yield from _one_large(kennel, rgw_server, memory_folder, 4 << 30)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_of_a_killed_archive_of_one_4_gib_object_no_durable_window_is_fetched_again(four_gib: Scene) -> None:
    kills: list[Durable] = []
    runs: list[Run] = []
    for served in (8, 12, 16):  # windows that this run receives before it is killed; some 4 more are under way
        with four_gib.running() as run:
            run.wait_until(lambda: len(run.proxy.served) > served)  # noqa: B023 - called in this round only
            assert run.kill() == -signal.SIGKILL
        runs.append(run)
        kills.append(four_gib.durable())
    runs.append(four_gib.finish())

    four_gib.assert_archived()

    counts = [len(durable.windows) for durable in kills]
    assert 0 < counts[0] < counts[1] < counts[2] < 64
    manifests = four_gib.manifests()
    for number, durable in enumerate(kills):
        for run in runs[number + 1 :]:
            assert durable.fetched_again(manifests, run.requests) == []
