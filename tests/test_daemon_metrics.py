"""Metrics: what is counted, that labels stay few, and that rules and dashboard ask for what is there."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from mover.daemon_health import HealthMonitor
from mover.daemon_jobs import QueueStatistics
from mover.daemon_metrics import DaemonMetrics
from mover.daemon_probes import LtsProbe
from mover.daemon_rates import ByteMeter
from mover.daemon_watchdog import LoopState
from mover.engine import EngineStatistics
from mover.model import Progress, Stage
from mover.policies.limits import LimitStatistics
from mover.policies.space import SpaceReading, SpaceStatistics
from mover.reports import Tally
from mover.streams.memory import PoolStatistics
from mover.streams.s3 import S3Statistics
from mover.streams.s3_read import ReaderStatistics

pytestmark = pytest.mark.anyio

DOCKER = Path(__file__).parent.parent / "docker"
_FUNCTIONS = {"sum", "by", "rate", "increase", "on", "max", "histogram_quantile", "le", "and", "or", "up"}
_FOREIGN = {"up", "process_resident_memory_bytes", "process_open_fds"}


def _engine() -> EngineStatistics:
    tally = Tally(Counter({Stage.MOVE: 30}), Counter({Stage.MOVE: 2}), Counter({Stage.VERIFY: 1}))
    return EngineStatistics(
        limits=(LimitStatistics("MOVE_TO_LTS_LIMIT", 2, ("a_1.tar",), 3, 2, 7, 12.5, 4.0),),
        space=SpaceStatistics(100, 1, 2),
        buffers=PoolStatistics(256, 64, 128, 0),
        reader=ReaderStatistics(5, 1000),
        store=S3Statistics({"head": 3}, 500, {"transient": 1}),
        tally=tally,
        retries={"transient": 4, "throttle": 1},
    )


def _queue() -> QueueStatistics:
    return QueueStatistics(
        jobs=3,
        queued=5,
        waiting=1,
        running=2,
        oldest_age_s=60.0,
        owners=(),
        working=(),
        accepted=9,
        ended={("archive", "done"): 4, ("archive", "failed"): 1},
        retries={"LtsError": 2},
        jobs_limit=100,
        datasets_limit=1000,
        intake_open=True,
    )


def _metrics(folder: Path) -> DaemonMetrics:
    health = HealthMonitor()
    health.report("s3", "ok", "", latency_s=0.02)
    health.report("lts", "hanging", "")
    lts = LtsProbe(folder, folder, 20)
    lts.reading = SpaceReading(1000, 400)
    loop = LoopState(0.001, 0.002, 5.0, blocked=2, blocked_s=11.0)
    return DaemonMetrics(health, lts, lambda: loop, engine=_engine, queue=_queue)


def _samples(metrics: DaemonMetrics) -> dict[tuple[str, ...], float]:
    text = metrics.exposition().decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _names(expression: str) -> set[str]:
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"|\b(?:by|on)\s*\([^)]*\)", " ", expression)
    return {word for word in re.findall(r"[a-z_][a-z0-9_:]*", bare) if word not in _FUNCTIONS} - _FOREIGN


async def test_the_state_of_engine_queue_and_dependencies_is_told(tmp_path: Path) -> None:
    found = _samples(_metrics(tmp_path))
    expected = {
        ("mover_limit_slots", "MOVE_TO_LTS_LIMIT"): 2,
        ("mover_limit_slots_in_use", "MOVE_TO_LTS_LIMIT"): 1,
        ("mover_limit_waiting", "MOVE_TO_LTS_LIMIT"): 3,
        ("mover_limit_wait_seconds_total", "MOVE_TO_LTS_LIMIT"): 12.5,
        ("mover_limit_longest_wait_seconds", "MOVE_TO_LTS_LIMIT"): 4,
        ("mover_objects_total", "archive"): 30,
        ("mover_datablocks_total", "archive"): 2,
        ("mover_verification_failures_total",): 1,
        ("mover_retries_total", "transient"): 4,
        ("mover_buffer_used_bytes",): 64,
        ("mover_lts_free_bytes",): 400,
        ("mover_lts_floor_bytes",): 200,
        ("mover_lts_reserved_bytes",): 100,
        ("mover_queue_datasets", "queued"): 5,
        ("mover_queue_oldest_age_seconds",): 60,
        ("mover_datasets_ended_total", "failed", "archive"): 1,
        ("mover_datasets_ended_total", "cancelled", "plan"): 0,
        ("mover_dependency_up", "s3", "true"): 1,
        ("mover_dependency_up", "lts", "true"): 0,
        ("mover_dependency_state", "lts", "hanging"): 1,
        ("mover_dependency_latency_seconds", "s3"): 0.02,
        ("mover_ready",): 0,
        ("mover_loop_blocked_total",): 2,
    }
    assert {key: found[key] for key in expected} == expected
    assert found["mover_dependency_last_success_timestamp_seconds", "s3"] > 1e9


async def test_before_there_is_an_engine_the_rest_is_told(tmp_path: Path) -> None:
    health = HealthMonitor()
    lts = LtsProbe(tmp_path, tmp_path, 20)
    loop = LoopState(0.0, 0.0, 5.0)
    metrics = DaemonMetrics(health, lts, lambda: loop, engine=lambda: None, queue=lambda: None)
    assert ("mover_ready",) in _samples(metrics)


async def test_bytes_are_counted_once_by_direction_and_stage_whatever_was_done_before(tmp_path: Path) -> None:
    metrics = _metrics(tmp_path)
    for state, done_bytes in (("started", 40), ("progress", 60), ("progress", 60), ("finished", 100)):
        metrics.tell(Progress("a/b", Stage.MOVE, state, 1, done_bytes, 100))  # type: ignore[arg-type]
    metrics.tell(Progress("a/b", Stage.VERIFY, "started", 1, 0, 100))
    metrics.tell(Progress("a/b", Stage.VERIFY, "progress", 1, 30, 100))
    metrics.tell(Progress("a/b", Stage.VERIFY, "failed", 1, reason="broken"))
    metrics.tell(Progress("a/b", Stage.PLAN, "finished", 0, 7, 7))
    found = _samples(metrics)
    assert found["mover_bytes_total", "archive", "move"] == 60
    assert found["mover_bytes_total", "verify", "verify"] == 30
    assert found["mover_stage_failures_total", "verify"] == 1
    assert found["mover_stage_seconds_count", "move"] == 1


async def test_no_dataset_owner_or_message_becomes_a_label(tmp_path: Path) -> None:
    metrics = _metrics(tmp_path)
    before = len(_samples(metrics))
    for number in range(100):
        for state in ("started", "progress", "failed"):
            event = Progress(f"secret/{number}", Stage.MOVE, state, number, 5, 10, f"reason {number}")
            metrics.tell(event)
    assert len(_samples(metrics)) == before
    assert b"secret" not in metrics.exposition()


async def test_stages_that_never_end_do_not_pile_up(tmp_path: Path) -> None:
    metrics = _metrics(tmp_path)
    for number in range(10_000):
        metrics.tell(Progress(f"a/{number}", Stage.MOVE, "started", 1, 0, 10))
        metrics.tell(Progress(f"a/{number}", Stage.MOVE, "progress", 1, 5, 10))
    kept = [len(metrics.meter._done), len(metrics.meter._datasets), len(metrics._began)]  # noqa: SLF001
    assert max(kept) <= 4096


async def test_rates_are_those_of_the_last_seconds() -> None:
    now_s = 0.0
    meter = ByteMeter(clock=lambda: now_s)
    meter.tell(Progress("a/b", Stage.MOVE, "started", 1, 0, 10_000))
    for second in range(1, 21):
        now_s = float(second)
        meter.tell(Progress("a/b", Stage.MOVE, "progress", 1, second * 100, 10_000))
    assert meter.rates()["archive"] == pytest.approx(100, rel=0.15)
    assert meter.rate_of("a/b", "move") == pytest.approx(100, rel=0.15)
    now_s = 40.0
    assert meter.rates() == {"archive": 0, "verify": 0, "retrieve": 0}


async def test_every_metric_that_rules_and_dashboard_name_exists(tmp_path: Path) -> None:
    known = {name for name, *_ in _samples(_metrics(tmp_path))}
    rules: dict[str, Any] = yaml.safe_load((DOCKER / "prometheus" / "rules.yml").read_text())
    asked = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    dashboard = json.loads((DOCKER / "grafana" / "mover.json").read_text())
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(asked) > 10
    assert len(targets) > 20
    for expression in [*asked, *targets]:
        names = _names(expression)
        assert names <= known, (expression, names - known)
        assert names or expression.startswith(("up", "process_")), expression
