"""Reading back: every flipped bit is found and named, wherever it is and however the bytes are cut."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mover.model
from mover.errors import DigestMismatchError, LayoutMismatchError, LtsError
from mover.model import Datablock, SourceChecksum, window_count, window_range
from mover.streams.hashing import digest_of
from mover.streams.memory import BufferPool
from mover.streams.units import WindowKey
from mover.verify import ReadBack, ReadBackResult, raise_breaks, read_back
from tests.engines import datablock_bytes, lay_out

WINDOW = 1000
FILES = {
    "a": random.Random(1).randbytes(2500),
    "empty": b"",
    "long/" + "n" * 150: random.Random(2).randbytes(512),
    "z": random.Random(3).randbytes(7),
}
PATHS = list(FILES)


@pytest.fixture(autouse=True)
def _windows_of_1000_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mover.model, "WINDOW_BYTES", WINDOW)


def plan() -> Datablock:
    return lay_out({path: len(body) for path, body in FILES.items()})


def digests() -> dict[WindowKey, str]:
    found = {}
    for index, body in enumerate(FILES.values()):
        for window in range(window_count(len(body))):
            start, end = window_range(len(body), window)
            found[index, window] = digest_of(body[start:end])
    return found


def md5_parts(body: bytes, part_bytes: int) -> str:
    parts = [hashlib.md5(body[start : start + part_bytes]).digest() for start in range(0, len(body), part_bytes)]  # noqa: S324
    return f"{hashlib.md5(b''.join(parts)).hexdigest()}-{len(parts)}"  # noqa: S324


CLAIMS = {
    "a": SourceChecksum("md5-parts", md5_parts(FILES["a"], 1024), "s3-etag", 1024),
    "empty": SourceChecksum("md5", hashlib.md5(b"").hexdigest(), "s3-etag"),  # noqa: S324
    "z": SourceChecksum("sha256", hashlib.sha256(FILES["z"]).hexdigest(), "catalogue"),
}


def compare(data: bytes, cuts: Sequence[int] = (), claims: dict[str, SourceChecksum] | None = None) -> ReadBackResult:
    """The result of a read-back of ``data``, fed in pieces that end at ``cuts``."""
    comparison = ReadBack(plan(), digests(), CLAIMS if claims is None else claims)
    ends = [*sorted({min(cut, len(data)) for cut in cuts}), len(data)]
    position = 0
    for end in ends:
        comparison.feed(memoryview(data)[position:end])
        position = end
    return comparison.finish()


def flipped(data: bytes, at_byte: int) -> bytes:
    changed = bytearray(data)
    changed[at_byte] ^= 0x10
    return bytes(changed)


def owner(at_byte: int) -> tuple[int, int | None]:
    """(member, window or None for structure) that a byte of the file belongs to."""
    members = plan().members
    for index, member in enumerate(members):
        if at_byte < member.payload_offset_bytes:
            return index, None
        if at_byte < member.payload_offset_bytes + member.size_bytes:
            return index, (at_byte - member.payload_offset_bytes) // WINDOW
    return len(members) - 1, None


DATA = datablock_bytes(lay_out({path: len(body) for path, body in FILES.items()}), FILES)


def test_an_intact_datablock_is_proved_with_its_digest() -> None:
    result = compare(DATA)
    assert result.breaks == ()
    assert result.windows == digests()
    assert result.digest == digest_of(DATA)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(DATA) - 1), st.lists(st.integers(0, len(DATA)), max_size=30))
def test_any_flipped_bit_is_found_and_named_in_pieces_of_any_length(at_byte: int, cuts: list[int]) -> None:
    mover.model.WINDOW_BYTES, before = WINDOW, mover.model.WINDOW_BYTES
    try:
        data = flipped(DATA, at_byte)
        result = compare(data, cuts)
        (broken,) = result.breaks
        index, window = owner(at_byte)
        assert broken.path == PATHS[index]
        assert repr(PATHS[index]) in broken.where
        assert broken.side == "the LTS"
        if window is not None:
            assert f"window {window}" in broken.where
            assert broken.windows == ((index, window),)
            assert (broken.expected, broken.found) == (digests()[index, window], result.windows[index, window])
        else:
            assert "tar structure" in broken.where
            assert broken.windows[0][0] == index
        assert result == compare(data), "the pieces do not matter"
    finally:
        mover.model.WINDOW_BYTES = before


@pytest.mark.parametrize("change", [DATA[:-1], DATA[:-512], DATA[:700], b""])
def test_missing_bytes_are_found(change: bytes) -> None:
    with pytest.raises(LayoutMismatchError, match="missing at the end"):
        compare(change)


@pytest.mark.parametrize("cuts", [(), (len(DATA),), (len(DATA) - 1,)])
def test_bytes_after_the_end_are_found(cuts: Sequence[int]) -> None:
    with pytest.raises(LayoutMismatchError, match="end"):
        compare(DATA + b"\0", cuts)


@pytest.mark.parametrize(
    ("path", "claim", "origin"),
    [
        ("a", SourceChecksum("md5-parts", md5_parts(FILES["a"], 1023), "s3-etag", 1024), "s3-etag"),
        ("empty", SourceChecksum("md5", "0" * 32, "s3-etag"), "s3-etag"),
        ("z", SourceChecksum("sha256", "0" * 64, "catalogue"), "catalogue"),
    ],
)
def test_a_checksum_of_the_source_that_differs_blames_the_way_here_and_asks_for_all_windows(
    path: str, claim: SourceChecksum, origin: str
) -> None:
    (broken,) = compare(DATA, claims={**CLAIMS, path: claim}).breaks
    assert (broken.path, broken.algorithm, broken.expected) == (path, claim.algorithm, claim.value)
    assert origin in broken.side
    assert "the LTS" not in broken.side
    index = PATHS.index(path)
    assert broken.windows == tuple((index, window) for window in range(window_count(len(FILES[path]))))


def test_bytes_that_changed_on_the_lts_do_not_blame_the_source_as_well() -> None:
    (broken,) = compare(flipped(DATA, plan().members[0].payload_offset_bytes)).breaks
    assert broken.algorithm == "xxh3_128"


def test_a_claim_that_cannot_be_computed_proves_and_breaks_nothing() -> None:
    assert compare(DATA, claims={"a": SourceChecksum("sha1024", "0", "catalogue")}).breaks == ()


def test_the_error_names_the_first_break_and_notes_the_others() -> None:
    members = plan().members
    data = flipped(flipped(DATA, members[0].payload_offset_bytes + 1500), members[3].payload_offset_bytes)
    with pytest.raises(DigestMismatchError, match=r"member 'a', window 1.*the side at fault: the LTS") as caught:
        raise_breaks(compare(data).breaks)
    assert caught.value.__notes__ == [f"besides: {plan().name}, member 'z', window 0"]


class Memory:
    """A datablock in memory that fails where told."""

    def __init__(self, data: bytes, fails_at: int = -1) -> None:
        self._data, self._fails_at = data, fails_at

    async def read(self, offset_bytes: int, view: memoryview, stall_timeout_s: float) -> None:
        await anyio.lowlevel.checkpoint()
        if offset_bytes <= self._fails_at < offset_bytes + view.nbytes:
            raise LtsError("read", "x", f"no byte for {stall_timeout_s:g} s")
        view[:] = self._data[offset_bytes : offset_bytes + view.nbytes]


@pytest.mark.anyio
@pytest.mark.parametrize("piece_bytes", [97, 511, 4096, len(DATA) - 1, len(DATA), len(DATA) + 1])
async def test_reading_ahead_gives_the_same_result_for_every_buffer(
    monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr("mover.verify._READ_BYTES", piece_bytes)
    told: list[int] = []
    pool = BufferPool(1 << 20)
    comparison = ReadBack(plan(), digests(), CLAIMS)
    result = await read_back(Memory(DATA), comparison, len(DATA), pool, stall_timeout_s=1)
    told.append(comparison.fed_bytes)
    assert result == compare(DATA)
    assert told == [len(DATA)]
    assert pool.statistics().used_bytes == 0


@pytest.mark.anyio
async def test_a_read_that_fails_is_raised_and_frees_the_buffers() -> None:
    pool = BufferPool(1 << 20)
    with pytest.raises(LtsError, match="no byte for 1 s"):
        await read_back(Memory(DATA, 9000), ReadBack(plan(), {}, {}), len(DATA), pool, stall_timeout_s=1)
    assert pool.statistics().used_bytes == 0
