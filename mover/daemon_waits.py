"""Which datasets wait for a slot of a limit, and whom they wait for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mover.model import datablock_name
from mover.policies.limits import LimitStatistics

__all__ = ["datablock_stem", "limit_waits"]

_SHOWN: Final = 3


def datablock_stem(dataset_id: str) -> str:
    """What the names of a dataset's datablocks have in common."""
    return datablock_name(dataset_id, 1).rpartition("_")[0]


def limit_waits(limits: Sequence[LimitStatistics]) -> dict[str, str]:
    """What is waited for, by the stem of the datablocks that wait."""
    return {waiter.rpartition("_")[0]: _reason(limit) for limit in limits if limit.waiting for waiter in limit.waiters}


def _reason(limit: LimitStatistics) -> str:
    holders = ", ".join(limit.holders[:_SHOWN])
    more = f" and {len(limit.holders) - _SHOWN} more" if len(limit.holders) > _SHOWN else ""
    return f"a slot of {limit.name} (held by {holders}{more})" if holders else f"a slot of {limit.name}"
