from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tarfile
import time
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mover.errors import LayoutMismatchError
from mover.model import Datablock, Member
from mover.streams.tar import (
    RECORD_BYTES,
    datablock_size_bytes,
    end_bytes,
    header_bytes,
    header_size_bytes,
    padding_bytes,
    structure,
)
from tests.programs import needed_program

_PACKAGES = {"bsdtar": "libarchive-tools"}
GIB = 1 << 30
LIMIT = 8**11

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=150)
LONG_NAMES = st.integers(90, 1100).map(lambda length: "x" * length)
EDGE_SIZES = st.sampled_from([0, 1, 511, 512, 513, LIMIT - 1, LIMIT, LIMIT + 1, 2 << 40, 10**15])
EDGE_TIMES = st.sampled_from([-(10**10), -1, 0, 1, LIMIT - 1, LIMIT, 99_999_999_999])

ODD_NAMES = [
    "plain.txt",
    "with space/ two  blanks ",
    "caf\u00e9",
    "cafe\u0301",
    ".hidden/..double",
    "+&=%#?",
    "new\nline/x\n",
    "quote'\"`$(id)",
    "back\\slash\\n",
    "-rf",
    "--checkpoint-action=exec=false",
    "@list",
    "tab\tbell\x07del\x7f",
    "\U0001f52c/微鏡",
    "trailing\n",
    "!bang",
    "~tilde",
    "*?[glob]",
    "d" * 99 + "/slash-at-byte-100",
    "e" * 100,
    "f" * 101,
    "é" * 60,
    "/".join(["k" * 200] * 5) + "/" + "z" * 19,  # 1,024 bytes
    "/".join(["é" * 100] * 5) + "/" + "z" * 19,  # 1,024 bytes too
    "empty",
]


def reference_info(path: str, size_bytes: int, mtime_s: int) -> tarfile.TarInfo:
    """A member for tarfile. Whether its name is declared to be bytes is taken over: other tests say when it must be."""
    info = tarfile.TarInfo(path)
    info.size, info.mtime, info.mode = size_bytes, mtime_s, 0o644
    if b"hdrcharset=BINARY" in header_bytes(path, 0, 0)[512:-512]:
        info.pax_headers = {"hdrcharset": "BINARY"}
    return info


def reference_header(path: str, size_bytes: int, mtime_s: int) -> bytes:
    return reference_info(path, size_bytes, mtime_s).tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def lay_out(files: Iterable[tuple[str, int, int]]) -> Datablock:
    members, offset, payload = [], 0, 0
    for path, size_bytes, mtime_s in files:
        header = header_size_bytes(path, size_bytes, mtime_s)
        members.append(Member(path, size_bytes, "etag", mtime_s, offset, header))
        offset, payload = members[-1].end_bytes, payload + size_bytes
    return Datablock("pid", 1, tuple(members), payload, datablock_size_bytes(offset))


def payload_of(path: str, size_bytes: int) -> bytes:
    return (hashlib.sha256(path.encode()).digest() * (size_bytes // 32 + 1))[:size_bytes]


def write(target: Path, datablock: Datablock, payload: bool = True) -> None:
    """What a writer does: each piece and each payload once, at its place."""
    with target.open("xb") as file:
        for piece in structure(datablock):
            file.seek(piece.offset_bytes)
            file.write(piece.content)
        for member in datablock.members if payload else ():
            file.seek(member.payload_offset_bytes)
            file.write(payload_of(member.path, member.size_bytes))


@given(NAMES | LONG_NAMES, st.integers(0, 1 << 42) | EDGE_SIZES, st.integers(-(1 << 40), 1 << 40) | EDGE_TIMES)
@example("x" * 100, LIMIT - 1, LIMIT - 1)
@example("x" * 101, LIMIT, LIMIT)
@example("é", 0, -1)
def test_a_header_is_the_one_that_tarfile_writes_and_has_the_computed_size(path: str, size: int, mtime: int) -> None:
    header = header_bytes(path, size, mtime)
    assert header == reference_header(path, size, mtime)
    assert header_size_bytes(path, size, mtime) == len(header)


def test_pax_records_of_every_length_count_their_own_digits() -> None:
    for length in range(101, 1100):
        path = "x" * length
        header = header_bytes(path, 1, 1)
        assert header_size_bytes(path, 1, 1) == len(header)
        assert header == reference_header(path, 1, 1)
    for length in range(1, 101):
        assert header_bytes("é" * length, 1, 1) == reference_header("é" * length, 1, 1)


GOLDEN = [
    (("plain.txt", 5, 1_700_000_000), 512, "aede487d939bc58fcbff368f9a1be9b95c0a9b050953d2d765d470cb3612216e"),
    (("caf\u00e9", 0, 0), 1536, "6af02b282f2e553d4f13b4fb3906336e13f35238698534f93411ef3d7b5596ff"),
    (("cafe\u0301/-x\n", 1, 1), 1536, "7b9bd715960d57ddc07699c062e7467928b6db42a6feccfdb43e38117969daea"),
    (("k" * 1024, 8 * GIB, -1), 2560, "2b3ff10386b992421d32d3b3819fd2dd7364efab8fa6e4e1203f19a33b5367d5"),
    (("plain.txt", 8 * GIB - 1, LIMIT), 1536, "424666bf9d4470ba162ddc6761f27bc7ab2c14a46267df1408c5f37e5a173c86"),
]


@pytest.mark.parametrize(("arguments", "size", "digest"), GOLDEN)
def test_the_bytes_of_a_header_never_change(arguments: tuple[str, int, int], size: int, digest: str) -> None:
    header = header_bytes(*arguments)
    assert (len(header), hashlib.sha256(header).hexdigest()) == (size, digest)


@given(st.integers(0, 1 << 45))
def test_the_end_is_two_blocks_and_fills_the_record(blocks: int) -> None:
    content = blocks * 512
    assert 1024 <= end_bytes(content) < 1024 + RECORD_BYTES
    assert datablock_size_bytes(content) % RECORD_BYTES == 0


def test_an_archive_without_members_is_one_record_of_zeros() -> None:
    (piece,) = structure(Datablock("pid", 1, (), 0, datablock_size_bytes(0)))
    assert (piece.offset_bytes, piece.content) == (0, bytes(10_240))


FILES = st.lists(st.tuples(NAMES, st.integers(0, 3_000), st.integers(0, 1 << 35)), max_size=30)


@given(FILES)
def test_structure_and_payloads_cover_the_file_without_gap_or_overlap(files: list[tuple[str, int, int]]) -> None:
    datablock = lay_out(files)
    pieces = list(structure(datablock))
    assert len(pieces) == len(files) + 1
    position = 0
    for piece, member in zip(pieces, datablock.members, strict=False):
        assert piece.offset_bytes == position
        assert piece.end_bytes == member.payload_offset_bytes
        position = piece.end_bytes + member.size_bytes
        assert position + padding_bytes(member.size_bytes) == member.end_bytes
    assert pieces[-1].offset_bytes == position
    assert pieces[-1].end_bytes == datablock.size_bytes


@settings(deadline=None)  # it writes files
@given(files=FILES)
def test_the_file_is_to_the_byte_the_one_that_tarfile_writes(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[str, int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("tar", numbered=True)
    ours, theirs = folder / "ours.tar", folder / "theirs.tar"
    write(ours, lay_out(files))
    with tarfile.open(theirs, "x", format=tarfile.PAX_FORMAT, encoding="utf-8") as archive:
        for path, size_bytes, mtime_s in files:
            archive.addfile(reference_info(path, size_bytes, mtime_s), io.BytesIO(payload_of(path, size_bytes)))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_plan_of_another_layout_is_refused() -> None:
    good = lay_out([("a", 10, 1), ("b", 10, 1)])
    first, second = good.members
    moved = Member("b", 10, "e", 1, second.offset_bytes + 512, 512)
    longer = Member("a", 10, "e", 1, 0, 1024)
    for bad in (
        Datablock("pid", 1, (first, moved), 20, good.size_bytes),
        Datablock("pid", 1, (longer, second), 20, good.size_bytes),
        Datablock("pid", 1, good.members, 20, good.size_bytes + 10_240),
    ):
        with pytest.raises(LayoutMismatchError):
            list(structure(bad))


def run(program: str, *arguments: str | Path) -> bytes:
    command = [needed_program(program, _PACKAGES.get(program, "")), *arguments]
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "TZ": "UTC"}
    return subprocess.run(command, check=True, capture_output=True, env=environment, timeout=60).stdout


@pytest.fixture(scope="module")
def odd_files() -> list[tuple[str, int, int]]:
    times = [0, 1, 1_700_000_000, -86_400, LIMIT - 1, LIMIT + 5]  # 1970, now, 1969, 2242 and just after
    sizes = [0, 1, 511, 512, 513, 70_000]
    files = [(path, sizes[i % 6], times[i % 5]) for i, path in enumerate(sorted(ODD_NAMES))]
    return [*files, ("zz-empty", 0, times[5])]


@pytest.mark.parametrize("program", ["tar", "bsdtar", "python"])
def test_odd_names_sizes_and_times_come_back_from(
    program: str, odd_files: list[tuple[str, int, int]], tmp_path: Path
) -> None:
    archive, out = tmp_path / "block.tar", tmp_path / "out"
    write(archive, lay_out(odd_files))
    out.mkdir()
    if program == "python":
        with tarfile.open(archive) as opened:
            opened.extractall(out, filter="data")
    else:
        run(program, "-xf", archive, "-C", out)
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found == {path for path, _, _ in odd_files}
    for path, size_bytes, mtime_s in odd_files:
        unpacked = out / path
        assert unpacked.read_bytes() == payload_of(path, size_bytes)
        assert int(unpacked.stat().st_mtime) == mtime_s, path
        assert unpacked.stat().st_mode & 0o777 == 0o644


def test_a_key_of_one_segment_of_1024_bytes_is_listed_by_all_readers(tmp_path: Path) -> None:
    path, archive = "k" * 1024, tmp_path / "long.tar"
    write(archive, lay_out([(path, 3, 1)]))
    with tarfile.open(archive) as opened:
        assert opened.getnames() == [path]
    for program in ("tar", "bsdtar"):
        assert run(program, "-tf", archive).decode() == path + "\n"


def test_a_member_over_8_gib_is_followed_by_the_next_one_in_all_readers(tmp_path: Path) -> None:
    archive, size = tmp_path / "huge.tar", 9 * GIB + 1
    datablock = lay_out([("huge", size, 1), ("after", 5, 1)])
    write(archive, datablock, payload=False)  # a sparse file: the payloads are holes
    assert archive.stat().st_size == datablock.size_bytes
    with tarfile.open(archive) as opened:
        assert [(info.name, info.size) for info in opened] == [("huge", size), ("after", 5)]
    for program in ("tar", "bsdtar"):
        lines = run(program, "-tvf", archive).decode().splitlines()
        assert [line.split()[-1] for line in lines] == ["huge", "after"]
        assert str(size) in lines[0]


def test_gnu_tar_complains_only_about_the_record_that_keeps_decomposed_names(
    odd_files: list[tuple[str, int, int]], tmp_path: Path
) -> None:
    for name, files in (
        ("usual.tar", [item for item in odd_files if "\u0301" not in item[0]]),
        ("decomposed.tar", [("cafe\u0301", 1, 1)]),
    ):
        write(tmp_path / name, lay_out(files))
        done = subprocess.run(["tar", "-tf", tmp_path / name], check=True, capture_output=True, timeout=60)
        complaint = b"tar: Ignoring unknown extended header keyword 'hdrcharset'\n"
        assert done.stderr == (b"" if name == "usual.tar" else complaint)


def decomposed_names() -> list[str]:
    """Everything that composes, in a version of Unicode that is the same in every Python; Hangul by samples."""
    unicode = unicodedata.ucd_3_2_0
    letters = [chr(code) for code in range(0xA0, 0x30000) if not 0xD800 <= code < 0xE000]
    parts = {part for letter in letters if len(part := unicode.normalize("NFD", letter)) > 1}
    hangul = sorted(part for part in parts if "\u1100" <= part[0] <= "\u11ff")
    return sorted(parts.difference(hangul)) + hangul[::50]


def test_decomposed_names_come_back_as_they_were_from_a_reader_that_composes(tmp_path: Path) -> None:
    names = [f"{number:05d}-{part}.txt" for number, part in enumerate(decomposed_names())]
    assert len(names) > 1_000
    archive, out = tmp_path / "block.tar", tmp_path / "out"
    write(archive, lay_out((name, 0, 1) for name in names))
    out.mkdir()
    run("bsdtar", "-xf", archive, "-C", out)
    assert sorted(os.listdir(out)) == names  # noqa: PTH208 - names only


def test_composed_and_plain_names_need_no_declaration_of_bytes() -> None:
    for path in ("plain", "x" * 200, "caf\u00e9", "\u5fae\u93e1", "\uc11c\uc6b8", "\U0001f52c", "\u0434\u043e\u043c"):
        assert b"hdrcharset" not in header_bytes(path, 1, 1)


def test_headers_are_cheap() -> None:
    names = [f"run/{i:08d}/frame.tiff" for i in range(20_000)]
    begin = time.process_time()
    for name in names:
        header_bytes(name, 1_000, 1_700_000_000)
    built = time.process_time() - begin
    for name in names:
        header_size_bytes(name, 1_000, 1_700_000_000)
    counted = time.process_time() - begin - built
    assert built / len(names) < 100e-6, "a generous bound: some 3 µs are usual"
    assert counted / len(names) < 10e-6, "a generous bound: a third of a µs is usual"
