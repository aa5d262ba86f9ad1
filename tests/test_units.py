"""Cutting a datablock into units: every byte exactly once, whatever is done already."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mover.errors import LayoutMismatchError
from mover.model import WINDOW_BYTES, Datablock, Member, window_count, window_range
from mover.streams.tar import structure
from mover.streams.units import BATCH_BYTES, BATCH_MEMBERS, SMALL_BYTES, Batch, Slice, WindowKey, cut
from tests.engines import lay_out

SIZES = st.one_of(
    st.integers(0, 3000),
    st.sampled_from([0, 511, 512, 513, SMALL_BYTES - 1, SMALL_BYTES, SMALL_BYTES + 1]),
    st.sampled_from([WINDOW_BYTES - 1, WINDOW_BYTES, WINDOW_BYTES + 1, 3 * WINDOW_BYTES, 9 << 30]),
)
MEMBERS = st.lists(st.tuples(st.text("ab/\u00e9", min_size=1, max_size=120), SIZES), min_size=1, max_size=90)


@st.composite
def datablocks(draw: st.DrawFn) -> tuple[Datablock, set[WindowKey]]:
    members = draw(MEMBERS)
    datablock = lay_out({f"{position:03d}{name}": size for position, (name, size) in enumerate(members)})
    keys = [(index, window) for index, member in enumerate(datablock.members) for window in windows(member)]
    done = set(draw(st.lists(st.sampled_from(keys)))) if draw(st.booleans()) else set()
    return datablock, done


def windows(member: Member) -> range:
    return range(window_count(member.size_bytes))


def extents(datablock: Datablock, done: set[WindowKey]) -> list[tuple[int, int, WindowKey]]:
    """(start, end, window) of every run of bytes that some unit writes; structure counts for its window."""
    found = []
    for unit in cut(datablock, done):
        if isinstance(unit, Slice):
            start = unit.offset_bytes
            length = len(unit.gap) + unit.payload_bytes + len(unit.tail)
            found.append((start, start + length, (unit.index, unit.window)))
            continue
        position = unit.offset_bytes
        for item in unit.members:
            assert item.gap.offset_bytes == position
            end = item.gap.end_bytes + item.member.size_bytes
            found.append((position, end, (item.index, 0)))
            position = end
        if unit.tail:
            start, _, key = found.pop()
            found.append((start, position + len(unit.tail), key))
    return found


@settings(max_examples=150, deadline=None)
@given(datablocks())
def test_every_byte_belongs_to_exactly_one_unit_and_done_windows_to_none(
    case: tuple[Datablock, set[WindowKey]],
) -> None:
    datablock, done = case
    whole = sorted(extents(datablock, set()))
    position = 0
    for start, end, _ in whole:
        assert start == position
        position = end
    assert position == datablock.size_bytes
    everything = {(index, window) for index, member in enumerate(datablock.members) for window in windows(member)}
    assert [key for _, _, key in whole] == sorted(everything)
    # what is done is left out, and what is left has the very same place as without it
    assert sorted(extents(datablock, done)) == [extent for extent in whole if extent[2] not in done]


@settings(max_examples=50, deadline=None)
@given(datablocks())
def test_units_come_in_order_with_the_planned_structure_and_batches_are_bounded(
    case: tuple[Datablock, set[WindowKey]],
) -> None:
    datablock, done = case
    planned = [piece.content for piece in structure(datablock)]
    before = -1
    for unit in cut(datablock, done):
        assert unit.offset_bytes > before
        before = unit.offset_bytes
        if isinstance(unit, Batch):
            assert 0 < len(unit.members) <= BATCH_MEMBERS
            assert unit.payload_bytes <= BATCH_BYTES
            assert [item.gap.content for item in unit.members] == [planned[item.index] for item in unit.members]
            assert unit.tail in {b"", planned[-1]}
        else:
            assert unit.member.size_bytes > SMALL_BYTES
            assert (unit.start, unit.end) == window_range(unit.member.size_bytes, unit.window)
            assert unit.gap == (planned[unit.index] if unit.window == 0 else b"")


def test_the_first_unit_needs_no_look_at_the_last_member() -> None:
    datablock = lay_out({f"{number:07d}": 0 for number in range(1000)})
    units = cut(datablock)
    assert isinstance(next(units), Batch)


def test_offsets_that_are_not_the_layouts_are_refused() -> None:
    datablock = lay_out({"a": 10, "b": 10})
    first, second = datablock.members
    moved = Member(second.path, 10, "e", 5, second.offset_bytes + 512, second.header_bytes)
    with pytest.raises(LayoutMismatchError, match="offset of 'b'"):
        list(cut(Datablock(datablock.dataset_id, 1, (first, moved), 20, datablock.size_bytes)))
