"""Reports of the engine as the daemon keeps them: JSON of a bounded size, compressed."""

from __future__ import annotations

import zlib
from typing import Any, Final

import msgspec

from mover.model import DatasetPlan
from mover.policies.space import SpaceReading
from mover.reports import ArchiveReport, RetrieveReport, VerifyReport

__all__ = ["PackedReport", "Report", "pack_report", "plan_report"]

Report = ArchiveReport | RetrieveReport | VerifyReport | dict[str, Any]

_ROWS: Final = 20_000  # of a list: more is left out before anything is encoded, which holds up the event loop
_QUICK: Final = 1  # level of the compression: links shrink to a tenth at once


class PackedReport(msgspec.Struct, frozen=True):
    """Compressed JSON, and its size before."""

    body: bytes
    size_bytes: int


def plan_report(plan: DatasetPlan, space: SpaceReading | None, floor_percentage: float) -> dict[str, Any]:
    """A plan without its members, as ``mover plan --json`` has it, and the share as it is now, if it tells.

    ``floor_percentage``: of the share, what the daemon keeps free.
    """
    datablocks = [
        {
            "number": item.number,
            "name": item.name,
            "members": len(item.members),
            "payload_bytes": item.payload_bytes,
            "size_bytes": item.size_bytes,
        }
        for item in plan.datablocks[:_ROWS]
    ]
    document = {name: getattr(plan, name) for name in ("dataset_id", "fingerprint", "file_count")}
    document |= {"payload_bytes": plan.payload_bytes, "size_bytes": plan.size_bytes}
    document |= {"anomalies": plan.anomalies, "datablocks": datablocks}
    if len(plan.datablocks) > _ROWS:
        document["left_out"] = {"datablocks": len(plan.datablocks) - _ROWS}
    return document | {"space": space, "floor_percentage": floor_percentage}


def pack_report(report: Report, at_most_bytes: int) -> PackedReport:
    """A report whose JSON has at most so many bytes; what was cut off is counted by name in ``left_out``. Blocking."""
    document: dict[str, Any] = (
        dict(report) if isinstance(report, dict) else {name: getattr(report, name) for name in report.__struct_fields__}
    )
    left_out: dict[str, int] = dict(document.pop("left_out", {}))
    for name in _lists(document):
        _cut(document, left_out, name, _ROWS)
    while True:
        body = msgspec.json.encode(document | ({"left_out": left_out} if left_out else {}))
        if len(body) <= at_most_bytes or not _shrink(document, left_out):
            return PackedReport(zlib.compress(body, _QUICK), len(body))


def _lists(document: dict[str, Any]) -> list[str]:
    return [name for name, value in document.items() if isinstance(value, (list, tuple)) and value]


def _shrink(document: dict[str, Any], left_out: dict[str, int]) -> bool:
    """Halves the longest list; the script goes first, as it says the same as the links. False: nothing is left."""
    if document.get("script"):
        document["script"], left_out["script"] = "", 1
        return True
    names = _lists(document)
    if not names:
        return False
    name = max(names, key=lambda item: len(document[item]))
    _cut(document, left_out, name, len(document[name]) // 2)
    return True


def _cut(document: dict[str, Any], left_out: dict[str, int], name: str, rows: int) -> None:
    value = document[name]
    if len(value) > rows:
        document[name] = value[:rows]
        left_out[name] = left_out.get(name, 0) + len(value) - rows
