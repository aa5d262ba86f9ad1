"""Deleting sources: only what is proved and registered, and only if it is still the very same object."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
import pytest

from mover.cleanup import Registered, empty_staging_copy, is_proved, release_source
from mover.errors import ManifestError
from mover.model import Evidence, EvidenceLevel, Manifest, ManifestMember, archive_id, raw_object_key
from mover.policies.retry import RetryPolicy
from mover.streams.s3 import S3Store
from mover.streams.s3_calls import S3Endpoint
from tests.datasets import DATASET
from tests.faults import Answer, FaultProxy, Rule
from tests.servers import BucketFactory, S3Server, object_keys, put_objects

pytestmark = pytest.mark.anyio

NAMES = ["a", "b/c", "caf\u00e9", "line\tbreak", "100%+&"]
PROOF = Evidence(EvidenceLevel.READ_BACK, "2024-01-01T00:00:00Z", "host", "xxh3_128:00", "dropped")


def key_of(path: str) -> str:
    return raw_object_key(DATASET, path)


def manifest_of(etags: dict[str, str], number: int = 1, evidence: Evidence | None = PROOF) -> Manifest:
    members = tuple(
        ManifestMember(path, key_of(path), etag, len(path.encode()), 0, 0, 512, ("0" * 32,))
        for path, etag in etags.items()
    )
    proofs = () if evidence is None else (evidence,)
    name = archive_id(DATASET, number)
    return Manifest(DATASET, number, 2, name, "f", 1, 1, 1, PROOF.digest, members, proofs, "now", "mover")


@pytest.fixture
def landing(bucket: BucketFactory) -> str:
    return bucket()


@pytest.fixture
def etags(s3_server: S3Server, landing: str) -> dict[str, str]:
    found = put_objects(s3_server, landing, {key_of(name): name.encode() for name in NAMES})
    return {name: found[key_of(name)] for name in NAMES}


@pytest.fixture
async def proxy(s3_server: S3Server) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(s3_server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
async def store(s3_server: S3Server, proxy: FaultProxy) -> AsyncIterator[S3Store]:
    endpoint = S3Endpoint(proxy.url, s3_server.region, s3_server.access_key, s3_server.secret_key)
    async with S3Store.open(endpoint, policy=RetryPolicy(attempts=2, base_s=0.001)) as store:
        yield store


async def test_exactly_the_archived_objects_go_and_others_are_reported(
    s3_server: S3Server, landing: str, etags: dict[str, str], store: S3Store
) -> None:
    bystanders = {key_of("extra"): b"x", key_of("a") + "bc": b"x", f"{DATASET}/other": b"x"}
    put_objects(s3_server, landing, {**bystanders, key_of("b/c"): b"new"})
    report = await release_source(store, landing, [Registered(manifest_of(etags))])
    assert report.deleted == len(NAMES) - 1
    assert dict(report.kept) == {
        "b/c": "changed since it was archived",
        "extra": "not in a manifest",
        "abc": "not in a manifest",
    }
    assert object_keys(s3_server, landing) == sorted([*bystanders, key_of("b/c")])


@pytest.mark.parametrize(
    "evidence",
    [
        None,
        msgspec.structs.replace(PROOF, level=EvidenceLevel.WRITTEN),
        msgspec.structs.replace(PROOF, digest="xxh3_128:ff"),
        msgspec.structs.replace(PROOF, digest=""),
        msgspec.structs.replace(PROOF, cache=""),
    ],
)
async def test_one_manifest_without_proof_keeps_everything(
    s3_server: S3Server, landing: str, etags: dict[str, str], store: S3Store, evidence: Evidence | None
) -> None:
    unproved = manifest_of({}, 2, evidence)
    assert not is_proved(unproved)
    with pytest.raises(ManifestError, match="the source stays"):
        await release_source(store, landing, [Registered(manifest_of(etags)), Registered(unproved)])
    with pytest.raises(ManifestError, match="the staging copy stays"):
        await empty_staging_copy(store, landing, unproved)
    assert len(object_keys(s3_server, landing)) == len(NAMES)


async def test_nothing_registered_deletes_nothing(store: S3Store, landing: str, proxy: FaultProxy) -> None:
    assert (await release_source(store, landing, [])).deleted == 0
    assert proxy.seen == []


async def test_a_second_release_finds_nothing_left(landing: str, etags: dict[str, str], store: S3Store) -> None:
    tokens = [Registered(manifest_of(etags))]
    assert (await release_source(store, landing, tokens)).deleted == len(NAMES)
    assert await release_source(store, landing, tokens) == type(await release_source(store, landing, []))(0)


async def test_a_server_that_refuses_batches_is_asked_key_by_key(
    s3_server: S3Server, landing: str, etags: dict[str, str], store: S3Store, proxy: FaultProxy
) -> None:
    proxy.rules.append(Rule(Answer(501, "NotImplemented"), method="POST", times=100))
    report = await release_source(store, landing, [Registered(manifest_of(etags))])
    assert report.deleted == len(NAMES)
    assert object_keys(s3_server, landing) == []
    assert [seen.method for seen in proxy.seen].count("DELETE") == len(NAMES)


async def test_a_key_that_cannot_be_deleted_is_reported_with_its_reason(
    s3_server: S3Server, landing: str, etags: dict[str, str], store: S3Store, proxy: FaultProxy
) -> None:
    proxy.rules.append(Rule(Answer(501, "NotImplemented"), method="POST", times=100))
    proxy.rules.append(Rule(Answer(403, "AccessDenied"), method="DELETE", target="raw_files/b/c", times=100))
    report = await release_source(store, landing, [Registered(manifest_of(etags))])
    assert report.deleted == len(NAMES) - 1
    ((path, reason),) = report.kept
    assert path == "b/c"
    assert "AccessDenied" in reason
    assert object_keys(s3_server, landing) == [key_of("b/c")]


async def test_a_staging_copy_goes_when_its_datablock_is_proved(
    s3_server: S3Server, landing: str, etags: dict[str, str], store: S3Store
) -> None:
    manifest = manifest_of(etags)
    put_objects(s3_server, landing, {manifest.archive_id: b"tar"})
    await empty_staging_copy(store, landing, manifest)
    assert manifest.archive_id not in object_keys(s3_server, landing)
    assert len(object_keys(s3_server, landing)) == len(NAMES)
