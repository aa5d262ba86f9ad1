"""What a plan means for the LTS and for the clock, from rates that are stated with the answer."""

from __future__ import annotations

import math

import msgspec

from mover.model import DatasetPlan
from mover.policies.space import SpaceReading
from mover.shown import bytes_text, seconds_text

__all__ = ["Forecast", "Rates", "forecast"]


class Rates(msgspec.Struct, frozen=True):
    """Assumed rates: bytes per second of moving and of reading back (all limits together), objects per second."""

    move_bytes_per_s: float = 200e6
    verify_bytes_per_s: float = 200e6
    objects_per_s: float = 500.0


class Forecast(msgspec.Struct, frozen=True):
    """Space of the LTS before and after a plan, what has to stay free, and the time it takes at ``rates``."""

    total_bytes: int
    free_before_bytes: int
    free_after_bytes: int
    floor_bytes: int
    floor_percentage: float
    fits: bool
    fits_ever: bool
    estimate_s: float
    rates: Rates

    def lines(self) -> list[str]:
        """The forecast in words."""
        before = f"{bytes_text(self.free_before_bytes)} of {bytes_text(self.total_bytes)} free"
        after = bytes_text(max(self.free_after_bytes, 0))
        floor = f"{self.floor_percentage:g} % ({bytes_text(self.floor_bytes)}) must stay free"
        if self.fits:
            verdict = "it fits"
        elif self.fits_ever:
            verdict = f"it waits until {bytes_text(self.floor_bytes - self.free_after_bytes)} more are free"
        else:
            verdict = "it never fits: a datablock is larger than what may be used of the share"
        rates = self.rates
        stated = (
            f"at {rates.move_bytes_per_s / 1e6:g} MB/s moving, {rates.verify_bytes_per_s / 1e6:g} MB/s reading back,"
            f" {rates.objects_per_s:g} objects/s"
        )
        return [
            f"LTS: {before}, {after} afterwards; {floor}: {verdict}",
            f"time: about {seconds_text(self.estimate_s)} {stated}",
        ]


def forecast(plan: DatasetPlan, space: SpaceReading, floor_percentage: float, rates: Rates) -> Forecast:
    """Of one plan. Moving and reading back overlap, but for the last datablock, which is read back alone."""
    floor_bytes = math.ceil(space.total_bytes * floor_percentage / 100)
    largest_bytes = max((item.size_bytes for item in plan.datablocks), default=0)
    last_bytes = plan.datablocks[-1].size_bytes if plan.datablocks else 0
    move_s = max(plan.size_bytes / rates.move_bytes_per_s, plan.file_count / rates.objects_per_s)
    verify_s = plan.size_bytes / rates.verify_bytes_per_s
    after_bytes = space.free_bytes - plan.size_bytes
    return Forecast(
        total_bytes=space.total_bytes,
        free_before_bytes=space.free_bytes,
        free_after_bytes=after_bytes,
        floor_bytes=floor_bytes,
        floor_percentage=floor_percentage,
        fits=after_bytes >= floor_bytes,
        fits_ever=largest_bytes <= space.total_bytes - floor_bytes,
        estimate_s=max(move_s, verify_s) + last_bytes / rates.verify_bytes_per_s,
        rates=rates,
    )
