"""Checksums over streams give hashlib's and S3's values, however the stream is cut."""

from __future__ import annotations

import hashlib
import importlib.util
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mover.model import SourceChecksum
from mover.streams.checksums import composite_md5, is_computable, normalise_algorithm, open_checksum


def claim(algorithm: str, part_size_bytes: int | None = None) -> SourceChecksum:
    return SourceChecksum(algorithm, "", "catalogue", part_size_bytes)


def composite(algorithm: str, data: bytes, part_size_bytes: int) -> str:
    starts = range(0, len(data), part_size_bytes) if data else range(1)
    digests = [hashlib.new(algorithm, data[start : start + part_size_bytes]).digest() for start in starts]
    return f"{hashlib.new(algorithm, b''.join(digests)).hexdigest()}-{len(digests)}"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("MD5", "md5"),
        ("sha1", "sha1"),
        ("SHA-1", "sha1"),
        ("sha2", "sha256"),
        ("sha-2", "sha256"),
        ("SHA-256", "sha256"),
        ("sha2-256", "sha256"),
        ("blake2b", "blake2b"),
        ("CRC64NVME", "crc64nvme"),
        ("md5-parts", "md5-parts"),
        ("sha256-parts", "sha256-parts"),
        ("sha512", None),
        ("crc32", None),
        ("", None),
    ],
)
def test_names_of_catalogues_are_understood(name: str, expected: str | None) -> None:
    assert normalise_algorithm(name) == expected


@pytest.mark.parametrize(
    ("name", "plain"), [("md5", "md5"), ("sha1", "sha1"), ("sha-2", "sha256"), ("blake2b", "blake2b")]
)
def test_whole_checksums_are_those_of_hashlib(name: str, plain: str) -> None:
    checksum = open_checksum(claim(name))
    assert checksum is not None
    checksum.update(memoryview(b"first "))
    checksum.update(b"second")
    assert checksum.hexdigest() == hashlib.new(plain, b"first second").hexdigest()


@given(
    data=st.binary(max_size=400),
    part_size_bytes=st.integers(min_value=1, max_value=130),
    cuts=st.lists(st.integers(min_value=0, max_value=400), max_size=6),
    algorithm=st.sampled_from(["md5", "sha256"]),
)
def test_composites_do_not_depend_on_how_the_stream_is_cut(
    data: bytes, part_size_bytes: int, cuts: list[int], algorithm: str
) -> None:
    checksum = open_checksum(claim(f"{algorithm}-parts", part_size_bytes))
    assert checksum is not None
    for start, end in pairwise([0, *sorted(cuts), len(data) if len(data) > max(cuts, default=0) else 400]):
        checksum.update(memoryview(data)[start:end])
    assert checksum.hexdigest() == composite(algorithm, data, part_size_bytes)


def test_a_digest_may_be_asked_for_in_between() -> None:
    checksum = open_checksum(claim("md5-parts", 4))
    assert checksum is not None
    checksum.update(b"abcd")
    assert checksum.hexdigest() == composite("md5", b"abcd", 4)
    checksum.update(b"e")
    assert checksum.hexdigest() == composite("md5", b"abcde", 4)


@pytest.mark.parametrize("bad", [claim("sha512"), claim("md5-parts"), claim("sha256-parts", 0), claim("md5-parts", -1)])
def test_what_cannot_be_computed_is_refused(bad: SourceChecksum) -> None:
    assert open_checksum(bad) is None


def test_crc64nvme_is_offered_exactly_where_its_library_is() -> None:
    there = importlib.util.find_spec("awscrt") is not None
    assert is_computable("crc64nvme") == there
    checksum = open_checksum(claim("crc64nvme"))
    assert (checksum is not None) == there
    if checksum is not None:
        checksum.update(memoryview(b"12345"))
        checksum.update(b"6789")
        assert checksum.hexdigest() == "ae8b14860a799888"  # the catalogue of parametrised CRCs: check value


def test_the_etag_of_parts_needs_the_md5_of_each() -> None:
    etags = [hashlib.md5(part, usedforsecurity=False).hexdigest() for part in (b"one", b"two")]
    assert composite_md5(etags) == composite("md5", b"onetwo", 3)
    assert composite_md5([*etags, "0" * 31]) is None
    assert composite_md5([]) is None
