"""The error tree: every failure knows whether to retry, whose fault it is, and its exit code.

Messages are built here, from operands, so that a caller names *what* happened and never formats text.
Exit codes are part of the command-line contract (ARCHITECTURE.md, "Command line").
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum, StrEnum
from typing import ClassVar

__all__ = [
    "CatalogueAccessError",
    "CatalogueConflictError",
    "CatalogueTransientError",
    "ConfigError",
    "DaemonAccessError",
    "DaemonRunningError",
    "DaemonTransientError",
    "DatasetBusyError",
    "DatasetNotFoundError",
    "DigestMismatchError",
    "ExitCode",
    "Fault",
    "HostileNameError",
    "IncompleteDatasetError",
    "IntakeClosedError",
    "IntegrityError",
    "JobFinishedError",
    "JobMismatchError",
    "JobNotFoundError",
    "JournalError",
    "KeyConflictError",
    "LayoutMismatchError",
    "ListenError",
    "LtsError",
    "ManifestError",
    "MissingFilesError",
    "MissingMountError",
    "MoverError",
    "NotEnoughSpaceError",
    "NotOpenError",
    "ObjectAccessError",
    "ObjectChangedError",
    "ObjectMissingError",
    "ObjectThrottledError",
    "ObjectTransientError",
    "OrderRefusedError",
    "ProcessingError",
    "QueueFullError",
    "RecallTimeoutError",
    "ShortReadError",
    "SourceDiffersError",
    "StallError",
    "UnknownFileError",
    "UnknownJobError",
    "UploadMissingError",
    "UsageError",
    "UserError",
    "WriteOnceError",
    "describe_paths",
    "gravity",
]

_SHOWN_PATHS = 10


class Fault(StrEnum):
    """Whose action ends the failure: the scientist's or the facility's."""

    USER = "user"
    SYSTEM = "system"


class ExitCode(IntEnum):
    """Exit codes of ``mover``."""

    DONE = 0
    SYSTEM = 1
    USAGE = 2
    USER = 3
    INTEGRITY = 4
    SPACE = 5
    INTERRUPTED = 130


_GRAVITY = (
    ExitCode.DONE,
    ExitCode.SYSTEM,
    ExitCode.USAGE,
    ExitCode.USER,
    ExitCode.SPACE,
    ExitCode.INTEGRITY,
    ExitCode.INTERRUPTED,
)  # the gravest last: what needs eyes on the data before what needs disks, an owner, a new try


def gravity(code: ExitCode) -> int:
    """Which of several failures counts: the higher number."""
    return _GRAVITY.index(code)


def describe_paths(paths: Sequence[str], shown: int = _SHOWN_PATHS) -> str:
    """Up to ``shown`` of ``paths``, quoted, with the number of the others."""
    listed = ", ".join(repr(path) for path in paths[:shown])
    return f"{listed} and {len(paths) - shown:,} more" if len(paths) > shown else listed


class MoverError(Exception):
    """Base of all failures of the mover.

    Class attributes: ``retryable`` (the same call may succeed later without anybody acting), ``fault``, ``exit_code``.
    """

    retryable: ClassVar[bool] = False
    fault: ClassVar[Fault] = Fault.SYSTEM
    exit_code: ClassVar[ExitCode] = ExitCode.SYSTEM


# ---------------------------------------------------------------------------------------------- usage (exit code 2)
class UsageError(MoverError):
    """A command or call that cannot mean anything."""

    fault = Fault.USER
    exit_code = ExitCode.USAGE


class ConfigError(UsageError):
    """A setting is unknown, missing or has a value that is not allowed."""

    def __init__(self, key: str, value: object, allowed: str, origin: str = "") -> None:
        self.key, self.value, self.allowed, self.origin = key, value, allowed, origin
        where = f" (from {origin})" if origin else ""
        super().__init__(f"{key}={value!r}{where}: allowed is {allowed}")


# ----------------------------------------------------------------------------------------- user errors (exit code 3)
class UserError(MoverError):
    """Something the owner of the dataset has to mend."""

    fault = Fault.USER
    exit_code = ExitCode.USER


class DatasetNotFoundError(UserError):
    """There is nothing under the dataset's name."""

    def __init__(self, dataset_id: str, where: str) -> None:
        self.dataset_id, self.where = dataset_id, where
        super().__init__(f"dataset {dataset_id!r}: nothing found at {where}")


class HostileNameError(UserError):
    """A name that could leave the folder it is unpacked to, or that no archive can hold."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(f"name {name!r} refused: {reason}")


class MissingFilesError(UserError):
    """The catalogue lists files that the landing zone does not have (or has with another size)."""

    def __init__(self, dataset_id: str, missing: Sequence[str], wrong_size: Sequence[str] = ()) -> None:
        self.dataset_id, self.missing, self.wrong_size = dataset_id, tuple(missing), tuple(wrong_size)
        parts = []
        if missing:
            parts.append(f"{len(missing):,} listed file(s) missing from the landing zone: {describe_paths(missing)}")
        if wrong_size:
            parts.append(f"{len(wrong_size):,} file(s) of another size than listed: {describe_paths(wrong_size)}")
        super().__init__(f"dataset {dataset_id!r}: {'; '.join(parts)}")


class SourceDiffersError(UserError):
    """The dataset is archived already, and the landing zone holds something else now."""

    def __init__(self, dataset_id: str, added: Sequence[str], removed: Sequence[str], changed: Sequence[str]) -> None:
        self.dataset_id = dataset_id
        self.added, self.removed, self.changed = tuple(added), tuple(removed), tuple(changed)
        kinds = (("added", self.added), ("removed", self.removed), ("changed", self.changed))
        parts = [f"{len(paths):,} {kind}: {describe_paths(paths)}" for kind, paths in kinds if paths]
        super().__init__(
            f"dataset {dataset_id!r} is archived already and its source differs from the manifests"
            f" ({'; '.join(parts)}); nothing was overwritten"
        )


class IncompleteDatasetError(UserError):
    """Some datablocks of a dataset have no manifest yet: it is not archived completely."""

    def __init__(self, dataset_id: str, missing: Sequence[int], datablock_count: int) -> None:
        self.dataset_id, self.missing, self.datablock_count = dataset_id, tuple(missing), datablock_count
        numbers = ", ".join(str(number) for number in missing[:_SHOWN_PATHS])
        more = f" and {len(missing) - _SHOWN_PATHS:,} more" if len(missing) > _SHOWN_PATHS else ""
        super().__init__(
            f"dataset {dataset_id!r} is not archived completely: of {datablock_count:,} datablocks, number"
            f" {numbers}{more} has no manifest; archive it again to finish"
        )


class UnknownFileError(UserError):
    """A single file was asked for that is in no datablock of the dataset."""

    def __init__(self, dataset_id: str, paths: Sequence[str]) -> None:
        self.dataset_id, self.paths = dataset_id, tuple(paths)
        super().__init__(f"dataset {dataset_id!r} has no file {describe_paths(paths)}")


class JobNotFoundError(UserError):
    """The catalogue has no such job, or can no longer update it."""

    def __init__(self, job_id: str, reason: str) -> None:
        self.job_id, self.reason = job_id, reason
        super().__init__(f"job {job_id!r}: {reason}")


class JobMismatchError(UserError):
    """The job is not what was asked to be done."""

    def __init__(self, job_id: str, reason: str) -> None:
        self.job_id, self.reason = job_id, reason
        super().__init__(f"job {job_id!r}: {reason}")


class JobFinishedError(UserError):
    """The job has ended already: a trigger was delivered twice."""

    def __init__(self, job_id: str, status_code: str) -> None:
        self.job_id, self.status_code = job_id, status_code
        super().__init__(f"job {job_id!r} has ended already, as {status_code}")


class ObjectMissingError(UserError):
    """An object of the plan is gone."""

    def __init__(self, op: str, location: str) -> None:
        self.op, self.location = op, location
        super().__init__(f"{op} {location}: the object does not exist (any more)")


class ObjectChangedError(UserError):
    """An object is not the one that the plan pinned."""

    def __init__(self, op: str, location: str, what: str, expected: object, found: object) -> None:
        self.op, self.location, self.what, self.expected, self.found = op, location, what, expected, found
        super().__init__(
            f"{op} {location}: the object changed since it was listed: {what} {found!r}, planned {expected!r}"
        )


# ------------------------------------------------------------------------------------ integrity errors (exit code 4)
class IntegrityError(MoverError):
    """Bytes are not what they were proved to be."""

    exit_code = ExitCode.INTEGRITY


class DigestMismatchError(IntegrityError):
    """A digest differs; names the member, the window, both values and the side at fault."""

    def __init__(self, where: str, algorithm: str, expected: str, found: str, side: str) -> None:
        self.where, self.algorithm, self.expected, self.found, self.side = where, algorithm, expected, found, side
        super().__init__(f"{where}: {algorithm} is {found}, expected {expected}; the side at fault: {side}")


class LayoutMismatchError(IntegrityError):
    """A datablock's size or tar structure is not the planned one."""

    def __init__(self, where: str, what: str, expected: object, found: object) -> None:
        self.where, self.what, self.expected, self.found = where, what, expected, found
        super().__init__(f"{where}: {what} is {found!r}, planned {expected!r}")


class CatalogueConflictError(IntegrityError):
    """The catalogue has a datablock of this name with another content."""

    def __init__(self, archive_id: str, what: str, expected: object, found: object) -> None:
        self.archive_id, self.what, self.expected, self.found = archive_id, what, expected, found
        super().__init__(
            f"the catalogue has datablock {archive_id!r} with another content: {what} is {found!r} there,"
            f" {expected!r} here"
        )


class ManifestError(IntegrityError):
    """A manifest cannot be read or contradicts itself or its datablock."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"manifest {path}: {reason}")


# ---------------------------------------------------------------------------------------------- space (exit code 5)
class NotEnoughSpaceError(MoverError):
    """The LTS stayed too full for as long as the deadline allowed."""

    retryable = True
    exit_code = ExitCode.SPACE

    def __init__(
        self,
        needed_bytes: int,
        free_bytes: int,
        reserved_bytes: int,
        floor_bytes: int,
        waited_s: float,
        reason: str = "",
    ) -> None:
        self.needed_bytes, self.free_bytes, self.reserved_bytes = needed_bytes, free_bytes, reserved_bytes
        self.floor_bytes, self.waited_s, self.reason = floor_bytes, waited_s, reason
        because = f"; {reason}" if reason else ""
        super().__init__(
            f"not enough space on the LTS: {needed_bytes:,} bytes needed, {free_bytes:,} free,"
            f" {reserved_bytes:,} reserved, {floor_bytes:,} must stay free; waited {waited_s:.0f} s{because}"
        )


# --------------------------------------------------------------------------------------- system errors (exit code 1)
class ObjectTransientError(MoverError):
    """The S3 server or the network failed in a way that passes."""

    retryable = True

    def __init__(self, op: str, location: str, reason: str) -> None:
        self.op, self.location, self.reason = op, location, reason
        super().__init__(f"{op} {location}: {reason}")


class ObjectThrottledError(ObjectTransientError):
    """The S3 server asks for a slower pace."""

    def __init__(self, op: str, location: str, reason: str, retry_after_s: float | None = None) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(op, location, reason)


class StallError(ObjectTransientError):
    """No byte arrived for the time that the stall watchdog allows."""

    def __init__(self, op: str, location: str, stall_timeout_s: float) -> None:
        self.stall_timeout_s = stall_timeout_s
        super().__init__(op, location, f"no byte for {stall_timeout_s:g} s")


class ShortReadError(ObjectTransientError):
    """A body ended before its last byte."""

    def __init__(self, op: str, location: str, expected_bytes: int, found_bytes: int) -> None:
        self.expected_bytes, self.found_bytes = expected_bytes, found_bytes
        super().__init__(op, location, f"the body ended after {found_bytes:,} of {expected_bytes:,} bytes")


class ObjectAccessError(MoverError):
    """The S3 server refuses: credentials, permissions, or a request it does not support."""

    def __init__(self, op: str, location: str, reason: str) -> None:
        self.op, self.location, self.reason = op, location, reason
        super().__init__(f"{op} {location}: {reason}")


class UploadMissingError(ObjectAccessError):
    """A multipart upload is gone: completed, aborted or expired. It has to be begun again."""

    def __init__(self, op: str, location: str) -> None:
        super().__init__(op, location, "the multipart upload does not exist (any more)")


class CatalogueTransientError(MoverError):
    """The catalogue or the way to it failed in a way that passes."""

    retryable = True

    def __init__(self, op: str, target: str, reason: str, retry_after_s: float | None = None) -> None:
        self.op, self.target, self.reason, self.retry_after_s = op, target, reason, retry_after_s
        super().__init__(f"catalogue, {op} {target}: {reason}")


class CatalogueAccessError(MoverError):
    """The catalogue refuses: credentials, permissions, a request that it does not take, an answer that is none."""

    def __init__(self, op: str, target: str, reason: str) -> None:
        self.op, self.target, self.reason = op, target, reason
        super().__init__(f"catalogue, {op} {target}: {reason}")


class LtsError(MoverError):
    """The LTS refused or failed a file operation."""

    retryable = True

    def __init__(self, op: str, path: str, reason: str) -> None:
        self.op, self.path, self.reason = op, path, reason
        super().__init__(f"{op} {path}: {reason}")


class MissingMountError(LtsError):
    """The root of the LTS is not there: a missing mount must not be taken for an empty share."""

    def __init__(self, path: str, expected: str = "", found: str = "") -> None:
        reason = f"{expected} is expected there, and found is {found}" if found else "it does not exist or is no folder"
        super().__init__("open", path, f"{reason}; is the share mounted?")


class WriteOnceError(LtsError):
    """A write-once mount holds something under the name that cannot be replaced."""

    retryable = False

    def __init__(self, path: str, reason: str) -> None:
        super().__init__("write", path, f"the mount is write-once: {reason}")


class RecallTimeoutError(LtsError):
    """The first byte of a file did not come back from tape in time."""

    def __init__(self, path: str, waited_s: float, state: str) -> None:
        self.waited_s, self.state = waited_s, state
        super().__init__("recall", path, f"no byte after {waited_s:.0f} s ({state})")


class DatasetBusyError(MoverError):
    """Another run holds the dataset."""

    retryable = True

    def __init__(self, dataset_id: str, holder: str) -> None:
        self.dataset_id, self.holder = dataset_id, holder
        super().__init__(f"dataset {dataset_id!r} is in use by {holder}")


class JournalError(MoverError):
    """The journal folder cannot be used."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"journal {path}: {reason}")


class ProcessingError(MoverError):
    """Several datasets of one call failed; the exit code is the gravest one's."""

    def __init__(self, failures: Sequence[tuple[str, MoverError]]) -> None:
        self.failures = tuple(failures)
        super().__init__("; ".join(f"{dataset_id}: {error}" for dataset_id, error in self.failures))


# -------------------------------------------------------------------------------------------------------- the daemon
class UnknownJobError(UserError):
    """The daemon has no such job, or keeps it no longer."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        super().__init__(f"no job {job_id!r} is known here; finished ones are kept for a limited time")


class KeyConflictError(UserError):
    """An idempotency key comes a second time, with another order."""

    def __init__(self, key: str, job_id: str) -> None:
        self.key, self.job_id = key, job_id
        super().__init__(f"key {key!r} belongs to job {job_id}, which is another order")


class QueueFullError(MoverError):
    """The queue has no room; ``retry_after_s`` is when it probably has."""

    retryable = True

    def __init__(self, what: str, limit: int, retry_after_s: float) -> None:
        self.what, self.limit, self.retry_after_s = what, limit, retry_after_s
        super().__init__(f"the queue is full: at most {limit:,} {what} at a time; try again in {retry_after_s:.0f} s")


class IntakeClosedError(MoverError):
    """The daemon is about to stop and takes no more jobs."""

    retryable = True

    def __init__(self) -> None:
        super().__init__("the daemon is stopping and takes no more jobs; try again once it is back")


class NotOpenError(MoverError):
    """The daemon is there, and its engine is not yet, or not any more."""

    retryable = True

    def __init__(self) -> None:
        super().__init__("the engine is not open; /readyz says why")


class ListenError(MoverError):
    """The daemon cannot listen where it should."""

    def __init__(self, where: str, reason: str) -> None:
        self.where, self.reason = where, reason
        super().__init__(f"cannot listen on {where}: {reason}")


class DaemonRunningError(MoverError):
    """Another daemon works on the same folder."""

    def __init__(self, folder: str, holder: str) -> None:
        self.folder, self.holder = folder, holder
        super().__init__(f"another daemon works on {folder}: {holder}")


class DaemonAccessError(UsageError):
    """The daemon lets the client do nothing, or not this: its address, its token or its role is wrong."""

    def __init__(self, url: str, reason: str) -> None:
        self.url, self.reason = url, reason
        super().__init__(f"daemon {url}: {reason}")


class OrderRefusedError(UsageError):
    """The daemon cannot make sense of what was asked of it."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class DaemonTransientError(MoverError):
    """The daemon is away, or has no room now; ``retry_after_s`` is when it asks to be tried again, if it does."""

    retryable = True

    def __init__(self, url: str, reason: str, retry_after_s: float | None = None) -> None:
        self.url, self.reason, self.retry_after_s = url, reason, retry_after_s
        super().__init__(f"daemon {url}: {reason}")
