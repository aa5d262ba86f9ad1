from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

import anyio
import anyio.lowlevel
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mover.catalogue import Catalogue, NoCatalogue
from mover.errors import DatasetNotFoundError, HostileNameError, MissingFilesError
from mover.model import (
    CatalogueFile,
    DatasetPlan,
    Evidence,
    EvidenceLevel,
    Manifest,
    ManifestMember,
    SourceChecksum,
    SourceObject,
    archive_id,
)
from mover.plan import Differences, compare_with_manifests, plan_dataset
from mover.policies.names import CollisionGuard
from mover.streams.tar import structure

pytestmark = pytest.mark.anyio

T = TypeVar("T")
WHERE = "s3://landing/pid"
MD5 = SourceChecksum("md5", "d41d8cd98f00b204e9800998ecf8427e", "catalogue")


def obj(path: str, size_bytes: int = 1, etag: str = "e", mtime_s: int = 5) -> SourceObject:
    return SourceObject(path, size_bytes, etag, mtime_s)


async def stream(items: Iterable[T]) -> AsyncIterator[T]:
    for item in items:
        yield item


async def make_plan(
    objects: Iterable[SourceObject], listed: Iterable[CatalogueFile] | None = None, target_bytes: int = 100
) -> DatasetPlan:
    files = None if listed is None else stream(listed)
    return await plan_dataset("pid", stream(objects), target_bytes=target_bytes, listed_files=files, where=WHERE)


def paths(plan: DatasetPlan) -> list[str]:
    return [member.path for datablock in plan.datablocks for member in datablock.members]


def anomalies(plan: DatasetPlan) -> list[tuple[str, str]]:
    return [(anomaly.kind, anomaly.path) for anomaly in plan.anomalies]


async def test_objects_are_packed_in_byte_order_whatever_order_they_are_listed_in() -> None:
    objects = [
        obj(f"{letter}{i:05d}/\U0001f52c" if i % 3 else f"{letter}{i:05d}\uffee", i % 90)
        for letter in "bé"
        for i in range(12_000)
    ]
    expected = await make_plan(sorted(objects, key=lambda item: item.path.encode()))
    assert paths(expected) == sorted((item.path for item in objects), key=str.encode)
    for seed in range(3):
        random.Random(seed).shuffle(objects)
        assert await make_plan(objects) == expected


OBJECTS = st.lists(
    st.tuples(st.text("abé/._", min_size=1, max_size=8), st.integers(0, 150), st.integers(-5, 1 << 34)),
    unique_by=lambda item: item[0],
    max_size=25,
)


def can_be_unpacked(objects: list[SourceObject]) -> bool:
    guard = CollisionGuard()
    try:
        for item in sorted(objects, key=lambda item: item.path):
            guard.add(item.path)
    except HostileNameError:
        return False
    return all(not {"", ".", ".."} & set(item.path.split("/")) for item in objects)


@settings(deadline=None, suppress_health_check=[HealthCheck.filter_too_much])  # each runs an event loop
@given(OBJECTS.map(lambda items: [obj(path, size, "e", mtime) for path, size, mtime in items]).filter(can_be_unpacked))
def test_sums_offsets_and_sizes_of_a_plan_are_exact(objects: list[SourceObject]) -> None:
    if not objects:
        return
    plan = anyio.run(make_plan, objects)
    assert plan.file_count == len(objects)
    assert plan.payload_bytes == sum(item.size_bytes for item in objects)
    assert plan.size_bytes == sum(datablock.size_bytes for datablock in plan.datablocks)
    assert [datablock.number for datablock in plan.datablocks] == list(range(1, len(plan.datablocks) + 1))
    for datablock in plan.datablocks:
        assert datablock.members
        assert datablock.payload_bytes == sum(member.size_bytes for member in datablock.members)
        *_, last = structure(datablock)  # raises unless each header is at its planned offset
        assert last.end_bytes == datablock.size_bytes


@pytest.mark.parametrize(
    "changed",
    [obj("b", 2), obj("b", etag="f"), obj("b", mtime_s=6), obj("c")],
    ids=["size", "etag", "mtime", "path"],
)
async def test_the_fingerprint_follows_everything_that_decides_the_bytes(changed: SourceObject) -> None:
    plan = await make_plan([obj("a"), obj("b")])
    assert plan.fingerprint == (await make_plan([obj("b"), obj("a")])).fingerprint
    assert plan.fingerprint != (await make_plan([obj("a"), changed])).fingerprint
    assert plan.fingerprint != (await make_plan([obj("a"), obj("b")], target_bytes=101)).fingerprint
    assert len(plan.fingerprint) == 32


@pytest.mark.parametrize("path", ["../x", "/x", "a//b", "a\0", "./a", "folder/", ""])
async def test_a_hostile_name_anywhere_in_the_listing_stops_the_plan(path: str) -> None:
    with pytest.raises(HostileNameError):
        await make_plan([obj("a"), obj(path)])
    with pytest.raises(HostileNameError):
        await make_plan([obj("a"), obj(path)], [CatalogueFile("a", 1)])


async def test_a_hostile_name_in_the_catalogue_or_a_hostile_dataset_id_stops_the_plan() -> None:
    with pytest.raises(HostileNameError):
        await make_plan([obj("a")], [CatalogueFile("a", 1), CatalogueFile("../a", 1)])
    with pytest.raises(HostileNameError):
        await plan_dataset("../pid", stream([obj("a")]), target_bytes=1, where=WHERE)


async def test_files_that_would_be_unpacked_onto_each_other_are_refused() -> None:
    with pytest.raises(HostileNameError, match="'a' is a file too"):
        await make_plan([obj("a/b"), obj("a.txt"), obj("a")])
    for listed in (None, [CatalogueFile("a", 1), CatalogueFile("b", 1)]):
        with pytest.raises(HostileNameError, match="listed twice"):
            await make_plan([obj("a"), obj("b"), obj("a", etag="f")], listed)


async def test_markers_of_folders_are_no_files_but_noted() -> None:
    plan = await make_plan([obj("", 0), obj("a/", 0), obj("a/b")])
    assert paths(plan) == ["a/b"]
    assert anomalies(plan) == [("directory-marker", ""), ("directory-marker", "a/")]


async def test_a_name_that_usual_file_systems_cannot_unpack_is_archived_and_noted() -> None:
    plan = await make_plan([obj("k" * 1024)])
    assert paths(plan) == ["k" * 1024]
    assert anomalies(plan) == [("long-name", "k" * 1024)]


async def test_nothing_listed_is_an_unknown_dataset_unless_the_catalogue_says_it_is_empty() -> None:
    for objects in ([], [obj("", 0)]):
        with pytest.raises(DatasetNotFoundError, match="landing"):
            await make_plan(objects)
        plan = await make_plan(objects, [CatalogueFile("folder", 4096, kind="directory")])
        assert (plan.datablocks, plan.file_count, plan.size_bytes) == ((), 0, 0)


async def test_an_empty_list_beside_objects_is_not_taken_for_an_empty_dataset() -> None:
    with pytest.raises(DatasetNotFoundError, match=r"catalogue's list of files, but 2 objects"):
        await make_plan([obj("a"), obj("b")], [])


async def test_the_catalogue_gives_times_and_checksums_and_decides_what_is_archived() -> None:
    listed = [
        CatalogueFile("b", 2, None),
        CatalogueFile("d", 4096, 1, "directory"),
        CatalogueFile("a", 1, 77, checksum=MD5),
    ]
    plan = await make_plan([obj("a", 1), obj("b", 2), obj("old", 3), obj("old", 3)], listed)
    assert [(member.path, member.mtime_s) for member in plan.datablocks[0].members] == [("a", 77), ("b", 5)]
    assert plan.checksums == {"a": MD5}
    assert anomalies(plan) == [("extra-object", "old")]


async def test_links_may_differ_in_size_or_have_no_object() -> None:
    listed = [CatalogueFile("l", 9, kind="symlink", checksum=MD5), CatalogueFile("to-folder", 3, kind="symlink")]
    plan = await make_plan([obj("l", 1_000)], listed)
    assert [member.size_bytes for member in plan.datablocks[0].members] == [1_000]
    assert anomalies(plan) == [("symlink-size", "l"), ("missing-symlink", "to-folder")]
    assert plan.checksums == {}


async def test_all_missing_files_and_all_wrong_sizes_are_named_at_once() -> None:
    listed = [CatalogueFile(path, 1) for path in ("gone2", "gone1", "a", "b")]
    with pytest.raises(MissingFilesError) as caught:
        await make_plan([obj("b", 2), obj("a", 1)], listed)
    assert (caught.value.missing, caught.value.wrong_size) == (("gone1", "gone2"), ("b",))


async def test_an_entry_listed_twice_counts_once_and_contradicting_entries_are_an_error() -> None:
    twins = [CatalogueFile("a", 1, 7), CatalogueFile("a", 1, 9, checksum=MD5)]
    plan = await make_plan([obj("a", 1)], twins)
    assert anomalies(plan) == [("duplicate-entry", "a")]
    assert plan == await make_plan([obj("a", 1)], reversed(twins))
    with pytest.raises(MissingFilesError) as caught:
        await make_plan([obj("a", 1)], [CatalogueFile("a", 1), CatalogueFile("a", 2)])
    assert caught.value.wrong_size == ("a",)


async def test_20_001_members_make_two_datablocks() -> None:
    plan = await make_plan([obj(f"{i:05d}") for i in range(20_001)], target_bytes=1 << 40)
    assert [len(datablock.members) for datablock in plan.datablocks] == [20_000, 1]


async def test_a_file_larger_than_the_target_is_alone_in_its_datablock() -> None:
    plan = await make_plan([obj("a", 0), obj("b", 9 << 30), obj("c", 0), obj("d", 100)], target_bytes=100)
    assert [[member.path for member in datablock.members] for datablock in plan.datablocks] == [
        ["a"],
        ["b"],
        ["c", "d"],
    ]


async def test_other_tasks_run_while_a_long_listing_is_planned() -> None:
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await anyio.lowlevel.checkpoint()
            turns += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count_turns)
        await make_plan((obj(f"{i:06d}") for i in range(40_000)), (CatalogueFile(f"{i:06d}", 1) for i in range(40_000)))
        tasks.cancel_scope.cancel()
    assert turns >= 3 * (40_000 // 2_000 - 1)


def manifests_of(plan: DatasetPlan) -> list[Manifest]:
    return [
        Manifest(
            dataset_id=plan.dataset_id,
            number=datablock.number,
            datablock_count=len(plan.datablocks),
            archive_id=archive_id(plan.dataset_id, datablock.number),
            fingerprint=plan.fingerprint,
            target_bytes=100,
            size_bytes=datablock.size_bytes,
            payload_bytes=datablock.payload_bytes,
            digest="",
            members=tuple(
                ManifestMember(m.path, m.path, m.etag, m.size_bytes, m.mtime_s, m.offset_bytes, m.header_bytes, ("",))
                for m in datablock.members
            ),
            evidence=(Evidence(EvidenceLevel.READ_BACK, "2024-01-01T00:00:00Z", "host"),),
            created_at="2024-01-01T00:00:00Z",
            software="test",
        )
        for datablock in plan.datablocks
    ]


async def test_differences_to_the_manifests_are_named() -> None:
    old = await make_plan([obj("a"), obj("b", 60), obj("c", 60), obj("d")])
    new = await make_plan([obj("a", etag="f"), obj("b", 61), obj("c", 60, mtime_s=9), obj("e")])
    manifests = manifests_of(old)
    assert len(manifests) == 2
    assert compare_with_manifests(old, manifests).none
    assert compare_with_manifests(new, manifests) == Differences(("e",), ("d",), ("a", "b"), complete=True)
    assert compare_with_manifests(old, manifests[:1]) == Differences(("c", "d"), (), (), complete=False)
    assert compare_with_manifests(old, []) == Differences(("a", "b", "c", "d"), (), (), complete=False)


def test_the_structure_of_a_datablock_follows_from_its_manifest_too() -> None:
    plan = anyio.run(make_plan, [obj("a", 5), obj("é", 6)])
    (manifest,) = manifests_of(plan)
    assert list(structure(manifest)) == list(structure(plan.datablocks[0]))


async def test_without_a_catalogue_there_is_no_list_and_everything_is_accepted() -> None:
    catalogue: Catalogue = NoCatalogue()
    (manifest,) = manifests_of(await make_plan([obj("a")]))
    assert await catalogue.listed_files("pid") is None
    await catalogue.register("pid", manifest)
    await catalogue.unregister("pid", manifest)
