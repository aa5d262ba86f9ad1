from __future__ import annotations

from itertools import pairwise

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from mover.policies import packing
from mover.policies.packing import MAX_CATALOGUE_BYTES, MAX_MEMBERS, Packer, catalogue_entry_bytes

SIZES = st.lists(st.integers(0, 120) | st.sampled_from([0, 100, 101, 1_000]), max_size=60)


def pack(sizes: list[int], target_bytes: int, entry_bytes: int = 300) -> list[list[int]]:
    packer, boxes = Packer(target_bytes), [list[int]()]
    for size in sizes:
        if not packer.fits(size, entry_bytes):
            packer.start()
            boxes.append([])
        packer.add(size, entry_bytes)
        boxes[-1].append(size)
        assert packer.members == len(boxes[-1])
    assert packer.payload_bytes == sum(boxes[-1])
    return [box for box in boxes if box]


@given(SIZES, st.integers(1, 200))
def test_members_keep_their_order_and_none_is_lost(sizes: list[int], target_bytes: int) -> None:
    assert [size for box in pack(sizes, target_bytes) for size in box] == sizes


@given(SIZES, st.integers(1, 200))
def test_a_datablock_exceeds_the_target_only_as_a_single_member(sizes: list[int], target_bytes: int) -> None:
    assert all(len(box) == 1 or sum(box) <= target_bytes for box in pack(sizes, target_bytes))


@given(SIZES, st.integers(1, 200))
def test_a_datablock_ends_only_where_the_next_member_does_not_fit(sizes: list[int], target_bytes: int) -> None:
    boxes = pack(sizes, target_bytes)
    assert all(sum(box) + following[0] > target_bytes for box, following in pairwise(boxes))


def test_a_member_over_the_target_has_no_neighbours_not_even_empty_ones() -> None:
    assert pack([0, 101, 0, 5, 100, 0, 0], 100) == [[0], [101], [0, 5], [100, 0, 0]]


def test_a_datablock_takes_20_000_members_and_not_one_more() -> None:
    assert MAX_MEMBERS == 20_000
    assert [len(box) for box in pack([1] * 20_001, 1 << 40)] == [20_000, 1]


def test_the_catalogue_list_of_a_datablock_stays_below_10_mb() -> None:
    entry = catalogue_entry_bytes("é" * 512)
    boxes = pack([1] * 20_000, 1 << 40, entry)
    assert MAX_CATALOGUE_BYTES == 10_000_000
    assert all(len(box) * entry < MAX_CATALOGUE_BYTES for box in boxes)
    assert all((len(box) + 4) * entry > MAX_CATALOGUE_BYTES for box in boxes[:-1])


@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200),
    st.integers(0, 2**63),
    st.sampled_from(["", "d41d8cd98f00b204e9800998ecf8427e", "f" * 128, "f" * 128 + "-10000"]),
)
def test_the_estimate_of_a_catalogue_entry_is_never_too_small(path: str, size_bytes: int, checksum: str) -> None:
    owner = {"uid": "0", "gid": "0", "perm": "420"}
    entry = {"path": path, "size": size_bytes, "time": "2024-02-29T23:59:59.999Z", "chk": checksum, **owner}
    assert len(msgspec.json.encode(entry)) + 1 <= catalogue_entry_bytes(path)


def test_a_list_of_the_longest_entries_and_its_envelope_fit_in_the_bound() -> None:
    packer, entries = Packer(1 << 40), list[dict[str, object]]()
    path = "\x01" * 100  # six bytes each in JSON
    entry = {**packing._LONGEST_ENTRY, "path": path}  # noqa: SLF001 - the bound is about exactly this
    while packer.fits(1, catalogue_entry_bytes(path)):
        packer.add(1, catalogue_entry_bytes(path))
        entries.append(entry)
    document = {"archiveId": "x" * 600, "ownerGroup": "g" * 100, "dataFileList": entries}
    assert 0.99 * MAX_CATALOGUE_BYTES < len(msgspec.json.encode(document)) <= MAX_CATALOGUE_BYTES
