"""Errors as the command line tells them: one record each, one exit code for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from mover.errors import ExitCode, Fault, MoverError, ProcessingError, gravity
from mover.shown import masked

__all__ = ["ErrorRecord", "gravest", "plain_error", "record_of"]


class ErrorRecord(msgspec.Struct, frozen=True):
    """A failure as ``--json`` tells it."""

    kind: str
    message: str
    exit_code: int
    retryable: bool
    fault: str


def gravest(errors: Sequence[BaseException]) -> BaseException:
    """The error whose exit code counts: integrity, space, user, usage, system, in this order."""
    return max(errors, key=lambda error: gravity(_exit_code(error)))


def record_of(error: BaseException, secrets: tuple[str, ...] = ()) -> ErrorRecord:
    """What ``--json`` says of an error."""
    leaf = plain_error(error)
    code = _exit_code(leaf)
    known = isinstance(leaf, MoverError)
    message = str(leaf) if known else f"unexpected {type(leaf).__name__}: {leaf}"
    return ErrorRecord(
        kind=type(leaf).__name__,
        message=masked(" ".join(message.split("\n")), secrets),
        exit_code=int(code),
        retryable=leaf.retryable if isinstance(leaf, MoverError) else False,
        fault=str(leaf.fault if isinstance(leaf, MoverError) else Fault.SYSTEM),
    )


def plain_error(error: BaseException) -> BaseException:
    """The error that tells most of a group: one that nobody expected, else the gravest."""
    if isinstance(error, ProcessingError):
        return plain_error(gravest([inner for _, inner in error.failures]))
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = list(_leaves(error))
    unexpected = [leaf for leaf in leaves if not isinstance(leaf, MoverError)]
    return unexpected[0] if unexpected else gravest(leaves)


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _exit_code(error: BaseException) -> ExitCode:
    leaf = plain_error(error)
    return leaf.exit_code if isinstance(leaf, MoverError) else ExitCode.SYSTEM
