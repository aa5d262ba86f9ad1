from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mover.errors import HostileNameError
from mover.policies.names import CollisionGuard, check_dataset_id, check_path, has_long_segment

REFUSED = {
    "": "empty",
    "/etc/passwd": "absolute",
    "//x": "absolute",
    "/": "absolute",
    "a//b": "an empty segment",
    "a/": "ends in '/'",
    "..": "'..' segment",
    "../x": "'..' segment",
    "a/../b": "'..' segment",
    "a/..": "'..' segment",
    ".": "'.' segment",
    "./a": "'.' segment",
    "a/./b": "'.' segment",
    "a/.": "'.' segment",
    "a\0b": "NUL",
    "a/\ud800": "UTF-8",
    "\udcff": "UTF-8",
}

ALLOWED = [
    "a",
    "...",
    "..a",
    "a..",
    ".hidden",
    "a/..b/.c/d..",
    "..\n",
    ".\n",
    "a/..\n",
    "with space/ and more ",
    "new\nline",
    "tab\t\x01\x7f",
    "caf\u00e9",
    "cafe\u0301",
    "+&=%#?",
    "%2e%2e/x",
    "..%2f",
    "-rf",
    "back\\slash\\..\\x",
    "quote'\"`$(x)",
    "\U0001f52c",
    "x" * 1024,
    "C:\\x",
]


@pytest.mark.parametrize("path", sorted(REFUSED))
def test_a_hostile_path_is_refused_with_its_reason(path: str) -> None:
    with pytest.raises(HostileNameError) as caught:
        check_path(path)
    assert REFUSED[path] in caught.value.reason
    assert caught.value.name == path
    str(caught.value).encode()  # printable even when the name is not


@pytest.mark.parametrize("path", ALLOWED)
def test_an_odd_but_harmless_path_is_allowed(path: str) -> None:
    check_path(path)


@given(st.text(st.sampled_from("./a\n\0\ud800\\"), max_size=12))
def test_what_is_allowed_has_only_segments_that_stay_below_a_folder(path: str) -> None:
    try:
        check_path(path)
    except HostileNameError:
        return
    assert not set(path.split("/")) & {"", ".", ".."}
    assert b"\0" not in path.encode()


@given(st.text(st.sampled_from("./a\n\0\ud800\\"), max_size=12))
def test_what_is_refused_is_hostile(path: str) -> None:
    try:
        check_path(path)
    except HostileNameError:
        assert set(path.split("/")) & {"", ".", ".."} or "\0" in path or "\ud800" in path


def first_collision(paths: set[str]) -> str | None:
    guard = CollisionGuard()
    for path in sorted(paths):
        try:
            guard.add(path)
        except HostileNameError as error:
            return error.name
    return None


@given(st.sets(st.lists(st.sampled_from(["a", "a!", "ab", "b", "é"]), min_size=1, max_size=4).map("/".join)))
def test_a_file_that_is_also_a_folder_is_found_whatever_lies_between_them(paths: set[str]) -> None:
    expected = [path for path in sorted(paths) if any(path.startswith(f"{other}/") for other in paths)]
    assert first_collision(paths) == (expected[0] if expected else None)


def test_a_collision_of_file_and_folder_names_both() -> None:
    guard = CollisionGuard()
    for path in ("a", "a!", "a-b", "a.txt"):
        guard.add(path)
    with pytest.raises(HostileNameError, match=r"'a/b' refused: 'a' is a file too"):
        guard.add("a/b")


def test_the_same_path_twice_is_refused_and_nfc_beside_nfd_is_not() -> None:
    guard = CollisionGuard()
    guard.add("cafe\u0301")
    guard.add("caf\u00e9")
    with pytest.raises(HostileNameError, match="listed twice"):
        guard.add("caf\u00e9")


@pytest.mark.parametrize(
    ("path", "is_long"),
    [
        ("x" * 255, False),
        ("x" * 256, True),
        ("é" * 127, False),
        ("é" * 128, True),
        ("a/" + "x" * 256 + "/b", True),
        ("x" * 200 + "/" + "x" * 200, False),
        ("\U0001f52c" * 63, False),
        ("\U0001f52c" * 64, True),
    ],
)
def test_a_segment_is_long_by_its_bytes(path: str, is_long: bool) -> None:
    assert has_long_segment(path) is is_long


@pytest.mark.parametrize("pid", ["20.500.11935/4b1c3d", "x", "a/b/c", "PID.SAMPLE.PREFIX/é", "100%", "a b", "x" * 200])
def test_a_usual_dataset_id_is_allowed(pid: str) -> None:
    check_dataset_id(pid)


@pytest.mark.parametrize(
    ("pid", "reason"),
    [
        ("", "empty"),
        ("/20.500", "absolute"),
        ("20.500/", "ends in '/'"),
        ("20.500//x", "empty segment"),
        ("20.500/../x", "'..' segment"),
        ("..", "'..' segment"),
        ("20.500/./x", "'.' segment"),
        ("a\0b", "NUL"),
        ("a\nb", "control"),
        ("a\x7fb", "control"),
        ("a\u0085b", "control"),
        ("a\u2028b", "control"),
        (" a", "white space"),
        ("a ", "white space"),
        (".a/b", "dot"),
        ("20.500.11935%2F4b1c", "percent-encoded"),
        ("a/raw_files/b", "raw_files"),
        ("a/datablocks", "datablocks"),
        ("é" * 101, "longer than 200 bytes"),
    ],
)
def test_a_hostile_dataset_id_is_refused_with_its_reason(pid: str, reason: str) -> None:
    with pytest.raises(HostileNameError) as caught:
        check_dataset_id(pid)
    assert reason in caught.value.reason
