"""What a finished job leaves in the catalogue: a short account of each dataset, and the links of a retrieval."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from mover.jobs_lifecycle import DatasetOutcome
from mover.reports import ArchiveReport, RetrieveReport

__all__ = ["archived_outcome", "job_result", "retrieved_outcome"]

_NOTES: Final = 100  # remarks about a dataset that the catalogue keeps; the others are counted
_LINKS_LIMIT_BYTES: Final = 6 << 20  # the catalogue takes 16 MB in one request and keeps 16 MB of one job


def archived_outcome(report: ArchiveReport) -> DatasetOutcome:
    """What is told about a dataset that is archived."""
    details = {
        "datablocks": len(report.datablocks),
        "files": report.file_count,
        "sizeBytes": report.payload_bytes,
        "packedSizeBytes": report.size_bytes,
        "notes": [f"{anomaly.kind}: {anomaly.path}: {anomaly.detail}" for anomaly in report.anomalies[:_NOTES]],
        "noteCount": len(report.anomalies),
    }
    message = f"{report.file_count:,} file(s) in {len(report.datablocks):,} datablock(s), read back and proved"
    return DatasetOutcome(report.dataset_id, "done", message, details)


def retrieved_outcome(report: RetrieveReport) -> DatasetOutcome:
    """What is told about a dataset that is in the retrieval bucket; the links are the job's business."""
    size_bytes = sum(item.size_bytes for item in report.objects)
    details = {"objects": len(report.objects), "sizeBytes": size_bytes, "expiresAt": report.expires_at}
    message = f"{len(report.objects):,} object(s), {size_bytes:,} bytes, ready until {report.expires_at}"
    return DatasetOutcome(report.dataset_id, "done", message, details)


def job_result(outcomes: Sequence[DatasetOutcome], reports: Sequence[RetrieveReport] = ()) -> dict[str, Any]:
    """The job's result object.

    ``datasets``: a row for each dataset. For retrievals also ``result``, a row for each object as the catalogue's
    e-mails show it (datasetId, name, size, url, archiveId), and ``downloadScript`` (base64) by dataset. Links beyond
    what the catalogue can hold are left out and counted in ``linksLeftOut``; the script comes first.
    """
    datasets = [
        {"datasetId": item.dataset_id, "state": item.state, "message": item.message, **_short(item.details)}
        for item in outcomes
    ]
    document: dict[str, Any] = {"datasets": datasets}
    if not reports:
        return document
    left_bytes, left_out = _LINKS_LIMIT_BYTES, 0
    rows: list[dict[str, Any]] = []
    scripts: dict[str, str] = {}
    for report in reports:
        script = base64.b64encode(report.script.encode()).decode()
        if len(script) <= left_bytes:
            scripts[report.dataset_id] = script
            left_bytes -= len(script)
        for item in report.objects:
            row = {
                "datasetId": report.dataset_id,
                "name": item.key.rpartition("/")[2],
                "size": item.size_bytes,
                "url": item.url,
                "archiveId": item.key,
            }
            row_bytes = len(msgspec.json.encode(row)) + 1
            if row_bytes <= left_bytes:
                rows.append(row)
                left_bytes -= row_bytes
            else:
                left_out += 1
    return document | {"result": rows, "downloadScript": scripts, "linksLeftOut": left_out}


def _short(details: dict[str, Any]) -> dict[str, Any]:
    """Without lists of paths and remarks: those are in the dataset's own message, a job may have a hundred datasets."""
    return {name: value for name, value in details.items() if not isinstance(value, list)}
