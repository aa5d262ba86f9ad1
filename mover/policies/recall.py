"""Decisions about files that may be on tape: what a stat tells, how long to wait, when to give up. No I/O."""

from __future__ import annotations

from enum import StrEnum

import msgspec

__all__ = ["RecallPolicy", "Residency", "residency"]


class Residency(StrEnum):
    """What a look at a file says about where its bytes are."""

    ONLINE = "online"
    OFFLINE = "offline"  # a size but no blocks: a stub, or a sparse file; only a read can tell
    EMPTY = "looks empty"  # shorter than it was written: a stub that hides its size
    REFUSED = "refused"  # the mount answers with an error for now


class RecallPolicy(msgspec.Struct, frozen=True):
    """How long to wait for the first byte of a file, and how often to look again."""

    timeout_s: float = 300.0
    first_wait_s: float = 1.0
    longest_wait_s: float = 30.0
    growth: float = 2.0

    def wait_s(self, attempt: int, waited_s: float) -> float | None:
        """Seconds until look number ``attempt + 1`` (attempts count from 1); None when ``waited_s`` used up the time.

        The last wait is cut so that the last look falls on the deadline.
        """
        left_s = self.timeout_s - waited_s
        if left_s <= 0:
            return None
        # 64 doublings exceed any wait; the bound keeps the power from overflowing
        backed_off_s = self.first_wait_s * self.growth ** min(attempt - 1, 64)
        return min(backed_off_s, self.longest_wait_s, left_s)


def residency(size_bytes: int, block_count: int, expected_bytes: int) -> Residency:
    """What size and allocated blocks of a stat mean for a file that was written with ``expected_bytes``."""
    if size_bytes < expected_bytes:
        return Residency.EMPTY
    if block_count == 0 and size_bytes > 0:
        return Residency.OFFLINE
    return Residency.ONLINE
