"""Which names may be archived: everything that a tar can hold and that unpacks below one folder.

Spaces, newlines, control characters, NFC beside NFD and segments of any length are names like any other. Refused is
what could leave the folder, what would land on another member, and what is no UTF-8.
"""

from __future__ import annotations

import re
from typing import Final

from mover.errors import HostileNameError

__all__ = [
    "MAX_DATASET_ID_BYTES",
    "MAX_SEGMENT_BYTES",
    "CollisionGuard",
    "check_dataset_id",
    "check_path",
    "has_long_segment",
]

MAX_SEGMENT_BYTES: Final = 255
"""Longest file name that the usual file systems hold; a tar holds longer ones."""

MAX_DATASET_ID_BYTES: Final = 200
"""The PID is part of file names on the LTS, beside a number and the suffixes of manifest and temporary file."""

_TOO_LONG = f"it is longer than {MAX_DATASET_ID_BYTES} bytes"

_SUSPECT = re.compile(r"\A/|/\Z|//|(?:\A|/)\.{1,2}(?:/|\Z)|[\0\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_PERCENT_ENCODED = re.compile(r"%[0-9A-Fa-f]{2}")
_OWN_FOLDERS = frozenset({"raw_files", "datablocks"})


def check_path(path: str) -> None:
    """Lets a member's path pass, or refuses it.

    Raises:
        HostileNameError: empty, absolute, with an empty, ``.`` or ``..`` segment, ending in ``/``, with NUL, not UTF-8.
    """
    if not path:
        raise HostileNameError(path, "it is empty")
    suspect = _SUSPECT.search(path)
    if suspect is not None:
        raise HostileNameError(path, _reason(path))


def _reason(path: str) -> str:
    segments = path.split("/")
    if "\0" in path:
        return "it contains NUL"
    if path.startswith("/"):
        return "it is absolute"
    if ".." in segments:
        return "it has a '..' segment"
    if "." in segments:
        return "it has a '.' segment"
    if path.endswith("/"):
        return "it ends in '/' and so names a folder"
    if "" in segments:
        return "it has an empty segment"
    return "it cannot be encoded as UTF-8"


def has_long_segment(path: str) -> bool:
    """Whether a segment is longer than usual file systems can unpack (``MAX_SEGMENT_BYTES``)."""
    if len(path) * 4 <= MAX_SEGMENT_BYTES or (len(path) <= MAX_SEGMENT_BYTES and path.isascii()):
        return False
    return any(len(segment.encode()) > MAX_SEGMENT_BYTES for segment in path.split("/"))


class CollisionGuard:
    """Finds paths that would be unpacked onto each other. Takes paths in their byte order; constant time for each.

    In that order everything that begins with a path follows it without a gap. So the paths that the current one begins
    with form a chain, and only the longest of them can be a new collision.
    """

    def __init__(self) -> None:
        self._chain: list[str] = []

    def add(self, path: str) -> None:
        """Takes the next path.

        Raises:
            HostileNameError: the path came before, or a file has the name of one of its folders.
        """
        chain = self._chain
        while chain and not path.startswith(chain[-1]):
            chain.pop()
        if chain:
            shorter = chain[-1]
            if len(path) == len(shorter):
                raise HostileNameError(path, "it is listed twice")
            if path[len(shorter)] == "/":
                reason = f"{shorter!r} is a file too, the two cannot be unpacked side by side"
                raise HostileNameError(path, reason)
        chain.append(path)


def check_dataset_id(dataset_id: str) -> None:
    """Lets a dataset's PID pass, or refuses it: it becomes folders and file names on the LTS and prefixes in buckets.

    Raises:
        HostileNameError: what ``check_path`` refuses; control characters or line separators; white space around it;
            a leading dot (its files would look like temporary ones); percent-encoding (it would name another folder
            than the PID it stands for); a segment that is one of the folders inside of datasets (its objects could
            be another dataset's too); more than ``MAX_DATASET_ID_BYTES``.
    """
    check_path(dataset_id)
    if _CONTROL.search(dataset_id):
        raise HostileNameError(dataset_id, "it contains control characters")
    if dataset_id != dataset_id.strip():
        raise HostileNameError(dataset_id, "there is white space around it")
    if dataset_id.startswith("."):
        raise HostileNameError(dataset_id, "it begins with a dot")
    if _PERCENT_ENCODED.search(dataset_id):
        raise HostileNameError(dataset_id, "it is percent-encoded; give the PID with its slashes")
    if not _OWN_FOLDERS.isdisjoint(dataset_id.split("/")):
        raise HostileNameError(dataset_id, "'raw_files' and 'datablocks' are folders inside of datasets")
    if len(dataset_id.encode()) > MAX_DATASET_ID_BYTES:
        raise HostileNameError(dataset_id, _TOO_LONG)
