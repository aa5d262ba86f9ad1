"""How much of a dataset's work is done, added up from the engine's events."""

from __future__ import annotations

from typing import Final

from mover.model import Progress, Stage

__all__ = ["WorkAmounts"]

_PAYLOAD_STAGES: Final = frozenset({Stage.STAGE, Stage.MOVE, Stage.VERIFY, Stage.RECALL, Stage.RETRIEVE})


class WorkAmounts:
    """Bytes of work, done and in all, of one or more datasets. ``tell`` returns at once.

    A byte counts once in every stage that reads or writes it; from its plan on an archive is known to move and to read
    back all of them. Events that bring the amounts of their dataset, as those of a daemon do, are taken at their word.
    """

    def __init__(self) -> None:
        self._stages: dict[tuple[str, int, Stage], tuple[int, int]] = {}
        self._sums: dict[str, tuple[int, int]] = {}
        self._planned: dict[str, int] = {}
        self._given: dict[str, tuple[int, int]] = {}

    def tell(self, event: Progress) -> None:
        """One event of the engine."""
        dataset_id = event.dataset_id
        if event.work_total_bytes:
            self._given[dataset_id] = event.work_done_bytes, event.work_total_bytes
        if event.stage is Stage.PLAN and event.state == "finished":
            self._planned[dataset_id] = 2 * event.total_bytes
        if event.stage in _PAYLOAD_STAGES and event.state in {"started", "progress", "finished"}:
            key = (dataset_id, event.datablock, event.stage)
            before_done, before_total = self._stages.get(key, (0, 0))
            total_bytes = max(event.total_bytes, before_total)
            self._stages[key] = event.done_bytes, total_bytes
            done_sum, total_sum = self._sums.get(dataset_id, (0, 0))
            self._sums[dataset_id] = done_sum + event.done_bytes - before_done, total_sum + total_bytes - before_total

    def of(self, dataset_id: str) -> tuple[int, int]:
        """Bytes done and bytes in all of one dataset; 0 in all as long as nothing is known."""
        if dataset_id in self._given:
            return self._given[dataset_id]
        done_bytes, total_bytes = self._sums.get(dataset_id, (0, 0))
        total_bytes = max(total_bytes, self._planned.get(dataset_id, 0))
        return min(done_bytes, total_bytes), total_bytes

    def total(self) -> tuple[int, int]:
        """The same of all datasets together."""
        amounts = [self.of(dataset_id) for dataset_id in {**self._given, **self._sums, **self._planned}]
        return sum(done for done, _ in amounts), sum(total for _, total in amounts)
