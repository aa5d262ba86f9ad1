"""Datablocks in SciCat: recorded once whatever is lost, compared with what is there, taken back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import anyio
import msgspec
import pytest

from mover.errors import (
    CatalogueAccessError,
    CatalogueConflictError,
    CatalogueTransientError,
    DatasetNotFoundError,
)
from mover.model import WINDOW_BYTES, Manifest, ManifestMember, SourceChecksum
from mover.scicat_datablocks import datablock_record
from mover.streams.hashing import digest_of
from tests.scicat_clients import DATASET, access_to, make_manifest, member, open_client
from tests.scicat_fake.control import Control
from tests.scicat_fake.server import ScicatServer

pytestmark = pytest.mark.anyio

POST = ("POST", r"/datablocks\Z")


@pytest.fixture
def control(scicat_server: ScicatServer) -> Control:
    scicat_server.control.seed_dataset(DATASET, {"a": 10})
    return scicat_server.control


def posts(control: Control) -> list[int]:
    return [request.status for request in control.requests(*POST)]


def claimed(path: str, algorithm: str) -> ManifestMember:
    value = hashlib.new(algorithm, path.encode()).hexdigest()
    return member(path, checksum=SourceChecksum(algorithm, value, "s3-checksum"))


# ---------------------------------------------------------------------------------------------------------- the record
async def test_a_record_says_what_the_manifest_says(scicat_server: ScicatServer, control: Control) -> None:
    manifest = make_manifest()
    async with open_client(scicat_server) as client:
        await client.register(DATASET, manifest)
    [stored] = control.datablocks(DATASET)
    assert stored["archiveId"] == manifest.archive_id
    assert (stored["size"], stored["packedSize"]) == (manifest.payload_bytes, manifest.size_bytes)
    assert (stored["chkAlg"], stored["version"]) == ("xxh3_128", "mover-1")
    assert [entry["path"] for entry in stored["dataFileList"]] == ["a", "folder/b ä\n"]
    assert stored["dataFileList"][0]["time"] == "2025-06-15T15:06:40.000Z"


def test_the_algorithm_that_all_members_share_is_what_the_record_has() -> None:
    members = claimed("a", "md5"), claimed("b", "md5")
    record = datablock_record(DATASET, make_manifest(*members))
    assert record["chkAlg"] == "md5"
    claims = [item.checksum.value for item in members if item.checksum]
    assert [entry["chk"] for entry in record["dataFileList"]] == claims


@pytest.mark.parametrize("other", [member("b"), claimed("b", "sha256")])
def test_without_a_shared_algorithm_the_record_has_the_digests_of_the_windows(other: ManifestMember) -> None:
    first = claimed("a", "md5")
    record = datablock_record(DATASET, make_manifest(first, other))
    assert record["chkAlg"] == "xxh3_128"
    assert [entry["chk"] for entry in record["dataFileList"]] == [first.windows[0], other.windows[0]]


def test_a_file_of_several_windows_has_a_digest_that_is_not_taken_for_its_own() -> None:
    large = member("large", 2 * WINDOW_BYTES + 1)
    [entry] = datablock_record(DATASET, make_manifest(large))["dataFileList"]
    assert entry["chk"] == digest_of(b"".join(map(bytes.fromhex, large.windows))) + "-3"


@pytest.mark.parametrize(("mtime_s", "text"), [(-1, "1969-12-31T23:59:59.000Z"), (2**60, "9999-12-31T23:59:59.000Z")])
def test_times_outside_of_the_calendar_are_its_ends(mtime_s: int, text: str) -> None:
    odd = msgspec.structs.replace(member("a"), mtime_s=mtime_s)
    assert datablock_record(DATASET, make_manifest(odd))["dataFileList"][0]["time"] == text


# -------------------------------------------------------------------------------------------------------- registration
@pytest.mark.slow
async def test_a_hundred_and_fifty_datablocks_are_registered_once(
    scicat_server: ScicatServer, control: Control
) -> None:
    manifests = [make_manifest(number=number) for number in range(1, 151)]
    async with open_client(scicat_server) as client:
        for _ in range(2):
            for manifest in manifests:
                await client.register(DATASET, manifest)
        assert len(control.datablocks(DATASET)) == 150
        assert posts(control) == [201] * 150
        assert await client.unregister_all(DATASET) == 150
        assert await client.unregister_all(DATASET) == 0
    assert control.datablocks(DATASET) == []


async def test_registrations_of_a_dataset_do_not_overlap(scicat_server: ScicatServer, control: Control) -> None:
    manifests = [make_manifest(number=number) for number in range(1, 9)]
    async with open_client(scicat_server) as client, anyio.create_task_group() as tasks:
        for manifest in manifests:
            tasks.start_soon(client.register, DATASET, manifest)
    calls = [request.method for request in control.requests(path=r"/datablocks\Z")]
    assert calls == ["GET", "POST"] * 8
    assert control.state.datasets[DATASET]["packedSize"] == sum(manifest.size_bytes for manifest in manifests)


@pytest.mark.parametrize(
    ("fault", "sent"),
    [
        (lambda control: control.lose_reply(*POST), [0]),
        (lambda control: control.lose_request(*POST), [0, 201]),
        (lambda control: control.fail(*POST, 500, body='"Internal server error"', handled=True), [500]),
        (lambda control: control.fail(*POST, 503, headers={"Retry-After": "1"}), [503, 201]),
        (lambda control: control.fail(*POST, 502, body="<html>", content_type="text/html", handled=True), [502]),
        (lambda control: control.fail(*POST, 409, body='{"message": "duplicate"}', handled=True), [409]),
        (lambda control: control.fail(*POST, 201, body="", handled=True), [201]),
        (lambda control: control.fail(*POST, 201, body="<html>", handled=True), [201]),
    ],
)
async def test_whatever_becomes_of_the_answer_there_is_one_record(
    scicat_server: ScicatServer, control: Control, fault: Callable[[Control], object], sent: list[int]
) -> None:
    fault(control)
    async with open_client(scicat_server) as client:
        await client.register(DATASET, make_manifest())
    assert posts(control) == sent
    assert len(control.datablocks(DATASET)) == 1


async def test_a_lost_answer_is_looked_up_before_the_post_is_repeated(
    scicat_server: ScicatServer, control: Control
) -> None:
    control.lose_reply(*POST)
    control.fail("GET", r"/datablocks\Z", 503, after=1)  # the look-up after the POST
    async with open_client(scicat_server) as client:
        await client.register(DATASET, make_manifest())
    assert posts(control) == [0]


async def test_an_expired_token_does_not_hide_a_record(scicat_server: ScicatServer, control: Control) -> None:
    control.switches.expired_is_anonymous = True
    manifest = make_manifest()
    async with open_client(scicat_server) as client:
        await client.register(DATASET, manifest)
        control.expire_tokens()
        await client.register(DATASET, manifest)
        control.expire_tokens()
        await client.unregister(DATASET, manifest)
    assert control.datablocks(DATASET) == []


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (make_manifest(member("a", 11)), " size is"),
        (msgspec.structs.replace(make_manifest(member("a")), size_bytes=1), "packedSize"),
        (make_manifest(claimed("a", "md5")), "chkAlg"),
        (msgspec.structs.replace(make_manifest(member("a"), member("b", 0)), size_bytes=10_250), "number of files"),
        (make_manifest(member("b")), "file list"),
    ],
)
async def test_another_content_under_the_same_name_is_a_conflict(
    scicat_server: ScicatServer, control: Control, other: Manifest, what: str
) -> None:
    async with open_client(scicat_server) as client:
        await client.register(DATASET, make_manifest(member("a")))
        with pytest.raises(CatalogueConflictError, match=what):
            await client.register(DATASET, other)
    assert len(control.datablocks(DATASET)) == 1


async def test_a_record_of_another_dataset_is_a_conflict_and_not_taken_back(
    scicat_server: ScicatServer, control: Control
) -> None:
    control.seed_dataset("other", {"a": 10})
    async with open_client(scicat_server) as client:
        await client.register(DATASET, make_manifest())
        with pytest.raises(CatalogueConflictError, match="datasetId"):
            await client.register("other", make_manifest())
        with pytest.raises(CatalogueConflictError, match="datasetId"):
            await client.unregister("other", make_manifest())
    assert len(control.datablocks(DATASET)) == 1


async def test_a_record_above_the_limit_is_not_sent(scicat_server: ScicatServer, control: Control) -> None:
    async with open_client(scicat_server, access_to(scicat_server, max_body_bytes=200)) as client:
        with pytest.raises(CatalogueAccessError, match="more than the 200 that the catalogue takes"):
            await client.register(DATASET, make_manifest())
    assert not control.requests()


async def test_a_server_with_a_lower_limit_is_named_as_a_cause(scicat_server: ScicatServer, control: Control) -> None:
    control.switches.body_limit_bytes = 1 << 20
    large = make_manifest(*(member(f"{'x' * 200}/{number}") for number in range(4_000)))
    async with open_client(scicat_server) as client:
        with pytest.raises(CatalogueTransientError, match="does the server take as much"):
            await client.register(DATASET, large)


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_a_refused_record_is_not_sent_again(scicat_server: ScicatServer, control: Control, status: int) -> None:
    control.fail(*POST, status, body='{"message": ["size must be a number"]}', times=-1)
    async with open_client(scicat_server) as client:
        with pytest.raises(CatalogueAccessError, match="size must be a number"):
            await client.register(DATASET, make_manifest())
    assert posts(control) == [status]


async def test_a_record_of_a_dataset_that_is_gone_is_a_user_error(
    scicat_server: ScicatServer, control: Control
) -> None:
    control.delete_dataset(DATASET)
    async with open_client(scicat_server) as client:
        with pytest.raises(DatasetNotFoundError):
            await client.register(DATASET, make_manifest())


# --------------------------------------------------------------------------------------------------------- taking back
async def test_taking_back_leaves_the_others_and_may_be_repeated(scicat_server: ScicatServer, control: Control) -> None:
    first, second = make_manifest(number=1), make_manifest(number=2)
    async with open_client(scicat_server) as client:
        await client.register(DATASET, first)
        await client.register(DATASET, second)
        control.lose_reply("DELETE", "/datablocks/")
        for _ in range(2):
            await client.unregister(DATASET, first)
    assert [stored["archiveId"] for stored in control.datablocks(DATASET)] == [second.archive_id]
