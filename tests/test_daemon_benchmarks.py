"""What the daemon's benchmarks make of what they measured."""

from __future__ import annotations

import math

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from benchmarks.daemon_soak import floor_growth_per_h, slope_per_h
from benchmarks.daemon_support import lag_between, percentile


def test_the_slope_is_that_of_what_stays_and_not_of_what_comes_and_goes() -> None:
    growing = [(float(at_s), 100 + 7 * at_s / 3600) for at_s in range(600, 1200)]
    assert slope_per_h(growing) == pytest.approx(7, rel=0.01)

    spikes = [(at_s, value + (500 if int(at_s) % 10 == 0 else 0)) for at_s, value in growing]
    assert slope_per_h(spikes) == pytest.approx(7, rel=0.05)


def test_what_is_flat_has_no_slope() -> None:
    assert slope_per_h([(float(at_s), 42.0) for at_s in range(600, 1200)]) == 0


def test_a_floor_grows_by_what_is_never_given_back_whatever_comes_and_goes() -> None:
    busy = [(float(at_s), 80.0 + (25 if at_s // 70 % 3 else at_s % 5)) for at_s in range(1200)]
    assert floor_growth_per_h(busy) == 0

    leaking = [(at_s, value + at_s // 120) for at_s, value in busy]  # a file in two minutes
    assert floor_growth_per_h(leaking) == pytest.approx(30, abs=7)


def test_a_percentile_is_a_value_that_was_measured() -> None:
    values = [float(number) for number in range(1000, 0, -1)]

    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (500, 990, 1000)
    assert percentile([3.0], 0.99) == 3


def test_the_lag_is_that_of_the_time_between_two_readings() -> None:
    registry = CollectorRegistry()
    lag = Histogram("mover_loop_lag_seconds", "", buckets=(0.001, 0.01, 0.05), registry=registry)
    lag.observe(7)
    before = generate_latest(registry).decode()
    for lag_s in [0.0005] * 60 + [0.005] * 38 + [0.02] * 2:
        lag.observe(lag_s)

    found = lag_between(before, generate_latest(registry).decode())

    assert (found.beats, found.p50_ms, found.p99_ms, found.max_ms) == (100, 1, 50, 50)
    lag.observe(7)
    assert lag_between(before, generate_latest(registry).decode()).max_ms == math.inf
