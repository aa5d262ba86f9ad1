"""The error tree: each class answers whether to retry, whose fault it is, and with which code to exit."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest

from mover import errors
from mover.errors import (
    ConfigError,
    DigestMismatchError,
    ExitCode,
    Fault,
    LtsError,
    MissingFilesError,
    MoverError,
    NotEnoughSpaceError,
    ObjectThrottledError,
    ObjectTransientError,
    ProcessingError,
    SourceDiffersError,
    StallError,
    WriteOnceError,
    describe_paths,
)


def _tree(root: type[MoverError] = MoverError) -> Iterator[type[MoverError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


_OWN = [error for error in _tree() if error.__module__ == "mover.errors"]


@pytest.mark.parametrize("error", _OWN, ids=lambda error: error.__name__)
def test_an_error_knows_retry_fault_and_exit_code(error: type[MoverError]) -> None:
    assert isinstance(error.retryable, bool)
    assert isinstance(error.fault, Fault)
    assert isinstance(error.exit_code, ExitCode)
    assert error.exit_code not in {ExitCode.DONE, ExitCode.INTERRUPTED}


@pytest.mark.parametrize("error", _OWN, ids=lambda error: error.__name__)
def test_an_error_of_the_user_is_not_retried_and_exits_with_the_user_s_codes(error: type[MoverError]) -> None:
    of_user = error.fault is Fault.USER
    assert of_user == (error.exit_code in {ExitCode.USER, ExitCode.USAGE})
    assert not (of_user and error.retryable)


def test_no_error_lives_outside_the_tree() -> None:
    classes = [item for _, item in inspect.getmembers(errors, inspect.isclass) if issubclass(item, Exception)]
    assert {item.__name__ for item in classes} == {error.__name__ for error in _OWN}
    assert {item.__name__ for item in classes} <= set(errors.__all__)


def test_no_error_hides_a_built_in_one() -> None:
    import builtins

    assert not {error.__name__ for error in _OWN} & set(dir(builtins))


def test_the_exit_codes_are_the_documented_ones() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "DONE": 0,
        "SYSTEM": 1,
        "USAGE": 2,
        "USER": 3,
        "INTEGRITY": 4,
        "SPACE": 5,
        "INTERRUPTED": 130,
    }


@pytest.mark.parametrize(
    ("error", "code", "retryable"),
    [
        (ConfigError("K", "v", "w"), ExitCode.USAGE, False),
        (MissingFilesError("d", ["a"]), ExitCode.USER, False),
        (DigestMismatchError("w", "md5", "0", "1", "lts"), ExitCode.INTEGRITY, False),
        (NotEnoughSpaceError(1, 2, 3, 4, 5.0), ExitCode.SPACE, True),
        (LtsError("write", "/f", "EIO"), ExitCode.SYSTEM, True),
        (WriteOnceError("/f", "held"), ExitCode.SYSTEM, False),
        (StallError("get", "s3://b/k", 30.0), ExitCode.SYSTEM, True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, MoverError) else None,
)
def test_the_classes_have_their_codes(error: MoverError, code: ExitCode, *, retryable: bool) -> None:
    assert (error.exit_code, error.retryable) == (code, retryable)


def test_messages_name_their_operands() -> None:
    assert str(ConfigError("K", "v", "1 to 3", "option")) == "K='v' (from option): allowed is 1 to 3"
    assert str(DigestMismatchError("a, window 3", "md5", "00", "ff", "LTS")) == (
        "a, window 3: md5 is ff, expected 00; the side at fault: LTS"
    )
    space = str(NotEnoughSpaceError(5_000, 4_000, 300, 200, 61.0))
    assert all(operand in space for operand in ("5,000", "4,000", "300", "200", "61 s"))
    missing = str(MissingFilesError("d/1", ["a"], ["b", "c"]))
    assert "1 listed file(s) missing" in missing
    assert "2 file(s) of another size" in missing
    differs = str(SourceDiffersError("d/1", ["new"], [], ["old"]))
    assert "1 added: 'new'" in differs
    assert "1 changed: 'old'" in differs
    assert "removed" not in differs


def test_a_long_list_of_paths_is_cut_with_the_number_of_the_others() -> None:
    assert describe_paths([f"f{i}" for i in range(10)]).count("'") == 20
    shown = describe_paths([f"f{i}" for i in range(1_234_567)])
    assert shown.endswith("'f9' and 1,234,557 more")


def test_operands_stay_readable_as_attributes() -> None:
    error = ObjectThrottledError("put", "s3://b/k", "503", retry_after_s=2.5)
    assert (error.op, error.location, error.retry_after_s) == ("put", "s3://b/k", 2.5)
    assert isinstance(error, ObjectTransientError)


def test_several_failures_are_all_named() -> None:
    failures = [("d/1", MissingFilesError("d/1", ["a"])), ("d/2", LtsError("write", "/f", "EIO"))]
    error = ProcessingError(failures)
    assert error.failures == tuple(failures)
    assert "d/1: " in str(error)
    assert "d/2: write /f: EIO" in str(error)
