"""One writer per dataset: SciCat writes a dataset back as a whole, so of two writers one loses its changes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

__all__ = ["DatasetLocks"]


class DatasetLocks:
    """A lock for each dataset that is being written; it exists as long as somebody holds it or waits for it."""

    def __init__(self) -> None:
        self._locks: dict[str, anyio.Lock] = {}
        self._users: dict[str, int] = {}

    @asynccontextmanager
    async def writing(self, dataset_id: str) -> AsyncIterator[None]:
        """Holds the dataset's lock for the block."""
        lock = self._locks.setdefault(dataset_id, anyio.Lock())
        self._users[dataset_id] = self._users.get(dataset_id, 0) + 1
        try:
            async with lock:
                yield
        finally:
            self._users[dataset_id] -= 1
            if not self._users[dataset_id]:
                del self._users[dataset_id], self._locks[dataset_id]
