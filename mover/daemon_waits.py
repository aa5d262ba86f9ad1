"""What datasets wait for: which of them for a slot of a limit, and whether that has changed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from mover.model import datablock_name
from mover.policies.limits import LimitStatistics

__all__ = ["datablock_stem", "is_same_wait", "limit_waits"]

_SHOWN: Final = 3
_WAITED = re.compile(r" \([0-9,]+ s\)")
_NUMBER = re.compile(r"[0-9]+(?:[,.][0-9]+)*")


def datablock_stem(dataset_id: str) -> str:
    """What the names of a dataset's datablocks have in common."""
    return datablock_name(dataset_id, 1).rpartition("_")[0]


def limit_waits(limits: Sequence[LimitStatistics]) -> dict[str, str]:
    """What is waited for, by the stem of the datablocks that wait."""
    return {waiter.rpartition("_")[0]: _reason(limit) for limit in limits if limit.waiting for waiter in limit.waiters}


def is_same_wait(one: str, other: str) -> bool:
    """Whether two reasons, each of several parts, are the same but for their numbers: amounts, and seconds waited."""
    return one == other or _parts(one) == _parts(other)


def _parts(reason: str) -> frozenset[str]:
    return frozenset(_NUMBER.sub("#", _WAITED.sub("", part)) for part in reason.split("; "))


def _reason(limit: LimitStatistics) -> str:
    holders = ", ".join(limit.holders[:_SHOWN])
    more = f" and {len(limit.holders) - _SHOWN} more" if len(limit.holders) > _SHOWN else ""
    return f"a slot of {limit.name} (held by {holders}{more})" if holders else f"a slot of {limit.name}"
