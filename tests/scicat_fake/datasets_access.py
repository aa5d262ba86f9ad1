"""How a dataset is found: missing is 404, invisible is 403."""

from __future__ import annotations

from tests.scicat_fake.access import may_read_dataset
from tests.scicat_fake.calls import Call
from tests.scicat_fake.errors import forbidden, http_error
from tests.scicat_fake.state import Document

__all__ = ["found", "readable"]


def found(call: Call, pid: str | None = None) -> Document:
    wanted = call.params["pid"] if pid is None else pid
    dataset = call.state.datasets.get(wanted)
    if dataset is None:
        raise http_error(404, f"dataset: {wanted} not found")
    return dataset


def readable(call: Call) -> Document:
    dataset = found(call)
    if not may_read_dataset(call.account, dataset):
        raise forbidden()
    return dataset
