"""What Prometheus is told. Labels have few values that are known beforehand: no datasets, no owners, no messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector

from mover import __version__
from mover.daemon_health import HealthMonitor, Readiness
from mover.daemon_probes import LtsProbe
from mover.daemon_rates import DIRECTIONS, ByteMeter
from mover.daemon_watchdog import LoopState
from mover.engine import EngineStatistics
from mover.model import Progress, Stage

if TYPE_CHECKING:
    from mover.daemon_jobs import QueueStatistics

disable_created_metrics()  # type: ignore[no-untyped-call]

__all__ = ["CONTENT_TYPE", "DaemonMetrics"]

CONTENT_TYPE = CONTENT_TYPE_LATEST

_LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_STAGE_BUCKETS = (0.1, 0.5, 1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 43200)
_STATES = ("unknown", "ok", "degraded", "failed", "hanging")
_RETRY_CLASSES = ("throttle", "transient")
_TIMED = (*DIRECTIONS, Stage.RECALL, Stage.REGISTER, Stage.RELEASE)
_KEPT = 4096  # stages under way; one that was cancelled tells no end


class DaemonMetrics:
    """The daemon's registry. Progress is counted as it comes; the state of engine and queue is read at each scrape."""

    def __init__(
        self,
        health: HealthMonitor,
        lts: LtsProbe,
        loop: Callable[[], LoopState],
        *,
        engine: Callable[[], EngineStatistics | None],
        queue: Callable[[], QueueStatistics | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``engine`` and ``queue`` give None while there is none yet."""
        self.registry = CollectorRegistry(auto_describe=False)
        self._bytes = Counter(
            "mover_bytes", "Bytes of datablocks by direction and stage", ("direction", "stage"), registry=self.registry
        )
        self._failures = Counter(
            "mover_stage_failures", "Stages of datablocks that failed", ("stage",), registry=self.registry
        )
        self._seconds = Histogram(
            "mover_stage_seconds",
            "Seconds that stages of datablocks took",
            ("stage",),
            buckets=_STAGE_BUCKETS,
            registry=self.registry,
        )
        self.loop_lag = Histogram(
            "mover_loop_lag_seconds",
            "How late timers of the event loop are",
            buckets=_LAG_BUCKETS,
            registry=self.registry,
        )
        self.meter = ByteMeter(lambda stage, size_bytes: self._bytes.labels(DIRECTIONS[stage], stage).inc(size_bytes))
        self._clock = clock
        self._began: dict[tuple[str, int, Stage], float] = {}
        self._begin_with_zeros()
        self.registry.register(_State(health, lts, loop, engine, queue))
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def _begin_with_zeros(self) -> None:
        """What has not happened yet is 0, not missing: rates of the first time are seen."""
        for stage, direction in DIRECTIONS.items():
            self._bytes.labels(direction, stage)
        for stage in _TIMED:
            self._failures.labels(stage)
            self._seconds.labels(stage)

    def tell(self, event: Progress) -> None:
        """Takes one progress event of the engine; returns at once."""
        self.meter.tell(event)
        if event.stage not in _TIMED:
            return
        key = (event.dataset_id, event.datablock, event.stage)
        if event.state == "started":
            self._began.pop(key, None)
            self._began[key] = self._clock()
            if len(self._began) > _KEPT:
                del self._began[next(iter(self._began))]
        elif event.state in {"finished", "failed"}:
            began_s = self._began.pop(key, None)
            if event.state == "failed":
                self._failures.labels(event.stage).inc()
            elif began_s is not None:
                self._seconds.labels(event.stage).observe(self._clock() - began_s)

    def exposition(self) -> bytes:
        """All metrics as Prometheus reads them; to be called on the event loop."""
        return generate_latest(self.registry)


class _State:
    """Reads everything that is a state when it is asked for."""

    def __init__(
        self,
        health: HealthMonitor,
        lts: LtsProbe,
        loop: Callable[[], LoopState],
        engine: Callable[[], EngineStatistics | None],
        queue: Callable[[], QueueStatistics | None],
    ) -> None:
        self._health, self._lts, self._loop, self._engine, self._queue = health, lts, loop, engine, queue

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client.registry.Collector."""
        yield _gauge("mover_build_info", "Always 1", {"version": __version__}, 1)
        yield from _of_health(self._health.readiness())
        yield from _of_lts(self._lts)
        loop = self._loop()
        yield _counter("mover_loop_blocked", "How often the event loop was blocked for seconds", loop.blocked)
        yield _counter("mover_loop_blocked_seconds", "For how long, in sum", loop.blocked_s)
        if (engine := self._engine()) is not None:
            yield from _of_engine(engine)
        if (queue := self._queue()) is not None:
            yield from _of_queue(queue)


def _gauge(name: str, text: str, labels: dict[str, str], value: float) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=tuple(labels))
    family.add_metric(tuple(labels.values()), value)
    return family


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value=value)


def _table(
    kind: type[GaugeMetricFamily | CounterMetricFamily], name: str, text: str, label: str, rows: dict[str, float]
) -> Metric:
    family = kind(name, text, labels=(label,))
    for key, value in rows.items():
        family.add_metric((key,), value)
    return family


def _of_health(readiness: Readiness) -> Iterator[Metric]:
    yield _gauge("mover_ready", "Whether all required dependencies work", {}, readiness.ready)
    up = GaugeMetricFamily("mover_dependency_up", "Whether a dependency works", labels=("dependency", "required"))
    state = GaugeMetricFamily("mover_dependency_state", "1 for the state it is in", labels=("dependency", "state"))
    latency: dict[str, float] = {}
    success: dict[str, float] = {}
    for view in readiness.dependencies:
        up.add_metric((view.name, str(view.required).lower()), view.state in {"ok", "degraded"})
        for name in _STATES:
            state.add_metric((view.name, name), view.state == name)
        if view.latency_s is not None:
            latency[view.name] = view.latency_s
        if view.last_success_at:
            success[view.name] = datetime.fromisoformat(view.last_success_at).timestamp()
    yield up
    yield state
    text = "Seconds that the last probe that was answered took"
    yield _table(GaugeMetricFamily, "mover_dependency_latency_seconds", text, "dependency", latency)
    name = "mover_dependency_last_success_timestamp_seconds"
    yield _table(GaugeMetricFamily, name, "When it worked last, Unix time", "dependency", success)


def _of_lts(lts: LtsProbe) -> Iterator[Metric]:
    if lts.reading is not None:
        yield _gauge("mover_lts_total_bytes", "Size of the LTS", {}, lts.reading.total_bytes)
        yield _gauge("mover_lts_free_bytes", "What is free there", {}, lts.reading.free_bytes)
        yield _gauge("mover_lts_floor_bytes", "What has to stay free there", {}, lts.floor_bytes)


def _of_engine(engine: EngineStatistics) -> Iterator[Metric]:
    yield _gauge("mover_lts_reserved_bytes", "Promised to datablocks, not yet written", {}, engine.space.reserved_bytes)
    yield _gauge("mover_lts_waiting", "Datablocks that wait for space", {}, engine.space.waiting)
    yield _gauge("mover_buffer_limit_bytes", "Memory for bytes in flight", {}, engine.buffers.limit_bytes)
    yield _gauge("mover_buffer_used_bytes", "What of it is in use", {}, engine.buffers.used_bytes)
    yield _gauge("mover_buffer_peak_bytes", "The most that was in use", {}, engine.buffers.peak_bytes)
    yield _gauge("mover_buffer_waiting", "Requests that wait for memory", {}, engine.buffers.waiting)
    for name, text, field in (
        ("mover_limit_slots", "Slots of a limit", "slots"),
        ("mover_limit_waiting", "Stages that wait for a slot", "waiting"),
        ("mover_limit_longest_wait_seconds", "How long the first of them has waited", "longest_wait_s"),
    ):
        rows = {limit.name: float(getattr(limit, field)) for limit in engine.limits}
        yield _table(GaugeMetricFamily, name, text, "limit", rows)
    held = {limit.name: float(len(limit.holders)) for limit in engine.limits}
    yield _table(GaugeMetricFamily, "mover_limit_slots_in_use", "Slots that are held", "limit", held)
    waited = {limit.name: limit.waited_s for limit in engine.limits}
    yield _table(CounterMetricFamily, "mover_limit_wait_seconds", "Seconds waited for slots", "limit", waited)
    granted = {limit.name: float(limit.granted) for limit in engine.limits}
    yield _table(CounterMetricFamily, "mover_limit_grants", "Slots given", "limit", granted)
    for name, text, tally in (
        ("mover_objects", "Objects that were archived, read back, retrieved", engine.tally.objects),
        ("mover_datablocks", "Datablocks that were written, read back, retrieved", engine.tally.datablocks),
    ):
        counts = {DIRECTIONS[stage]: float(tally[stage]) for stage in (Stage.MOVE, Stage.VERIFY, Stage.RETRIEVE)}
        yield _table(CounterMetricFamily, name, text, "direction", counts)
    mismatches = engine.tally.mismatches.total()
    yield _counter("mover_verification_failures", "Datablocks that were not what they have to be", mismatches)
    retries = {name: float(engine.retries.get(name, 0)) for name in _RETRY_CLASSES}
    yield _table(CounterMetricFamily, "mover_retries", "Repeated calls to the S3 storage", "class", retries)
    requests = {name: float(count) for name, count in engine.store.requests.items()} | {
        "get": float(engine.reader.requests)
    }
    yield _table(CounterMetricFamily, "mover_s3_requests", "Requests to the S3 storage", "operation", requests)
    yield _counter("mover_s3_received_bytes", "Bytes of bodies from the S3 storage", engine.reader.received_bytes)
    yield _counter("mover_s3_sent_bytes", "Bytes of bodies to the S3 storage", engine.store.sent_bytes)


def _of_queue(queue: QueueStatistics) -> Iterator[Metric]:
    states = {"queued": queue.queued, "waiting": queue.waiting, "running": queue.running}
    rows = {state: float(count) for state, count in states.items()}
    yield _table(GaugeMetricFamily, "mover_queue_datasets", "Unfinished datasets by their state", "state", rows)
    yield _gauge("mover_queue_jobs", "Unfinished jobs", {}, queue.jobs)
    yield _gauge("mover_queue_jobs_limit", "Unfinished jobs that are held at most", {}, queue.jobs_limit)
    yield _gauge("mover_queue_datasets_limit", "Unfinished datasets that are held at most", {}, queue.datasets_limit)
    yield _gauge("mover_queue_owners", "Owners with unfinished datasets", {}, len(queue.owners))
    text = "Age of the oldest job of which nothing was begun"
    yield _gauge("mover_queue_oldest_age_seconds", text, {}, queue.oldest_age_s)
    yield _gauge("mover_intake_open", "Whether jobs are taken", {}, queue.intake_open)
    yield _gauge(
        "mover_journal_failing", "Whether the last write to the store of jobs failed", {}, bool(queue.journal_error)
    )
    yield _counter("mover_jobs_accepted", "Jobs that were accepted", queue.accepted)
    ended = CounterMetricFamily("mover_datasets_ended", "Datasets of jobs by kind and end", labels=("kind", "end"))
    for kind in ("archive", "retrieve", "verify", "plan"):
        for end in ("done", "failed", "cancelled"):
            ended.add_metric((kind, end), queue.ended.get((kind, end), 0))
    yield ended
    retries = {name: float(count) for name, count in queue.retries.items()}
    yield _table(
        CounterMetricFamily, "mover_dataset_retries", "Datasets that are tried again, by error", "error", retries
    )
