"""The doctor finds real servers and folders in order, names what is not, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest

from mover.doctor import Check, CheckResult, Finding, Status, fine, run_checks
from mover.doctor_catalogue import catalogue_checks
from mover.doctor_lts import LtsChecks, measure_folder
from mover.doctor_s3 import S3Checks
from mover.engine import EngineConfig
from mover.errors import LtsError
from mover.parts import Buckets
from mover.scicat import SciCatAccess
from mover.settings_rules import Secret
from mover.streams.s3_calls import S3Endpoint
from tests.scicat_fake.server import ScicatServer
from tests.servers import BucketFactory, S3Server, object_keys

pytestmark = pytest.mark.anyio

_SIGNATURES_UNCHECKED = {"moto"}  # and Content-MD5


def _endpoint(server: S3Server) -> S3Endpoint:
    return S3Endpoint(server.endpoint_url, server.region, server.access_key, server.secret_key)


def _by_name(results: list[CheckResult]) -> dict[str, CheckResult]:
    return {result.name: result for result in results}


async def _examine(server: S3Server, buckets: Buckets, *, full: bool = False) -> dict[str, CheckResult]:
    async with S3Checks.open(_endpoint(server), buckets, full=full) as checks:
        return _by_name(await run_checks(checks.checks(), secrets=(server.secret_key,)))


async def test_a_working_server_passes_and_is_left_as_it_was(s3_server: S3Server, bucket: BucketFactory) -> None:
    buckets = Buckets(bucket(), bucket(), bucket())
    results = await _examine(s3_server, buckets)
    bad = [result for result in results.values() if result.status not in {Status.OK, Status.WARN}]
    assert not bad
    warned = {result.name for result in results.values() if result.status is Status.WARN}
    assert warned == ({"wrong Content-MD5", "presigned link"} if s3_server.name in _SIGNATURES_UNCHECKED else set())
    assert len(results) == 14
    for name in (buckets.landing_zone, buckets.staging, buckets.retrieval):
        assert object_keys(s3_server, name) == []


async def test_a_missing_bucket_fails_alone_and_the_other_checks_go_on(
    moto_server: S3Server, moto_bucket: Callable[[], str]
) -> None:
    results = await _examine(moto_server, Buckets("no-such-bucket", moto_bucket(), moto_bucket()))
    failed = [result.name for result in results.values() if result.status is Status.FAIL]
    assert failed == ["landing zone no-such-bucket"]


@pytest.mark.slow
async def test_a_server_that_is_not_there_fails_every_check_and_names_no_secret() -> None:
    gone = S3Server("gone", "http://127.0.0.1:9", "user", "very-secret-text")
    with anyio.fail_after(60):
        async with S3Checks.open(_endpoint(gone), Buckets("aaa", "bbb", "ccc"), full=False) as checks:
            chosen = [check for check in checks.checks() if check.name.startswith(("landing", "clock"))]
            results = await run_checks(chosen)
    assert {result.status for result in results} == {Status.FAIL}
    assert "very-secret-text" not in str(results)


async def test_a_hung_check_is_given_up_and_a_crashed_one_told() -> None:
    async def hang() -> Finding:
        await anyio.sleep_forever()
        return fine("never")

    async def crash() -> Finding:
        raise ZeroDivisionError

    async def refuse() -> Finding:
        raise LtsError("open", "/x", "no https://host/key?X-Amz-Signature=abc")

    async def work() -> Finding:
        return fine("good")

    checks = [Check("a", str(i), call, "do", 0.05) for i, call in enumerate((hang, crash, refuse, work))]
    results = await run_checks(checks)
    assert [result.status for result in results] == [Status.FAIL, Status.FAIL, Status.FAIL, Status.OK]
    assert "no answer" in results[0].measured
    assert "ZeroDivisionError" in results[1].measured
    assert "abc" not in results[2].measured


def _config(root: Path, scratch: Path, **values: object) -> EngineConfig:
    return EngineConfig(
        S3Endpoint("http://127.0.0.1:9", "r", "u", "p"),
        Buckets("a", "b", "c"),
        root,
        scratch,
        **{"free_space_percentage": 0.0, "target_bytes": 1 << 20, **values},  # type: ignore[arg-type]
    )


async def _examine_lts(config: EngineConfig) -> dict[str, CheckResult]:
    return _by_name(await run_checks(LtsChecks(config, speed_bytes=8 << 20).checks()))


async def test_a_working_folder_is_measured_and_left_empty(tmp_path: Path) -> None:
    root, scratch = tmp_path / "lts", tmp_path / "scratch"
    root.mkdir()
    scratch.mkdir()
    results = await _examine_lts(_config(root, scratch))
    assert {result.status for result in results.values()} <= {Status.OK, Status.WARN}
    assert "MB/s" in results["speed"].measured
    assert results[f"root {root}"].status is Status.WARN  # no mount point
    assert not [*root.iterdir(), *scratch.iterdir()]


async def test_a_missing_mount_is_no_empty_folder(tmp_path: Path) -> None:
    results = await _examine_lts(_config(tmp_path / "gone", tmp_path))
    assert results[f"root {tmp_path / 'gone'}"].status is Status.FAIL
    assert "mounted" in results[f"root {tmp_path / 'gone'}"].measured
    assert results["speed"].status is Status.SKIP
    assert results["memory"].status is Status.OK


async def test_a_share_that_can_never_hold_a_datablock_fails(tmp_path: Path) -> None:
    results = await _examine_lts(_config(tmp_path, tmp_path, target_bytes=1 << 60))
    assert results["free space"].status is Status.FAIL
    assert results["memory"].status is Status.FAIL


@pytest.mark.parametrize("direct", [False, True])
def test_what_is_measured_is_read_from_the_storage_and_removed(tmp_path: Path, direct: bool) -> None:
    speed = measure_folder(tmp_path, 8 << 20, direct=direct)
    assert speed.size_bytes == 8 << 20
    assert speed.identical
    assert not [*tmp_path.iterdir()]


@pytest.fixture
def moto_bucket(moto_server: S3Server) -> Iterator[Callable[[], str]]:
    from contextlib import ExitStack

    from tests.servers import fresh_bucket

    with ExitStack() as stack:
        yield lambda: stack.enter_context(fresh_bucket(moto_server))


async def test_the_catalogue_is_tried_with_the_account_and_its_groups(scicat_server: ScicatServer) -> None:
    access = SciCatAccess(scicat_server.url, scicat_server.user, Secret(scicat_server.password))
    (found,) = await run_checks(catalogue_checks(access))
    assert found.status is Status.OK
    assert "archivemanager" in found.measured


async def test_a_catalogue_that_refuses_the_account_fails_without_its_password(scicat_server: ScicatServer) -> None:
    access = SciCatAccess(scicat_server.url, scicat_server.user, Secret("not-the-password"))
    (found,) = await run_checks(catalogue_checks(access))
    assert found.status is Status.FAIL
    assert "not-the-password" not in found.measured + found.advice
    assert "SCICAT_PASSWORD" in found.advice


async def test_without_a_catalogue_its_check_says_that_there_is_none() -> None:
    (found,) = await run_checks(catalogue_checks(None))
    assert found.status is Status.SKIP
