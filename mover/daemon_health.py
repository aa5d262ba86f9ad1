"""Whether the daemon can work: every dependency is tried in the background, and the answer is always at hand.

No probe can hold up the loop or another probe: each has a deadline, and one that blocks has a thread of its own, which
is left behind when it hangs. Until that thread comes back the probe is not started again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Generic, Literal, TypeVar

import anyio
import msgspec

from mover.errors import MoverError
from mover.shown import masked, seconds_text, shown_name
from mover.streams.abandon import run_abandonable
from mover.tasks import open_task_group

__all__ = ["Blocking", "DependencyState", "DependencyView", "Finding", "HealthMonitor", "Probe", "Readiness"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

DependencyState = Literal["unknown", "ok", "degraded", "failed", "hanging"]
"""``degraded``: it works, with a drawback; ``hanging``: no answer within the deadline; ``unknown``: not tried yet."""


class Finding(msgspec.Struct, frozen=True):
    """What a probe saw of a dependency that answers."""

    detail: str
    state: Literal["ok", "degraded"] = "ok"


class Probe(msgspec.Struct, frozen=True):
    """One dependency and how it is tried. ``call`` raises for one that fails, TimeoutError for one that hangs.

    Without a ``required`` one the daemon is ready all the same.
    """

    name: str
    call: Callable[[], Awaitable[Finding]]
    required: bool = True
    deadline_s: float = 10.0
    every_s: float = 10.0


class DependencyView(msgspec.Struct, frozen=True):
    """One dependency as it was found last. Times are ISO 8601, '' for never; ``since``: when it came to this state.

    ``latency_s``: of the last probe that was answered.
    """

    name: str
    state: DependencyState
    required: bool
    detail: str
    latency_s: float | None
    checked_at: str
    last_success_at: str
    since: str


class Readiness(msgspec.Struct, frozen=True):
    """Whether all required dependencies work; ``summary`` names those that do not."""

    ready: bool
    summary: str
    dependencies: tuple[DependencyView, ...]


class Blocking(Generic[T]):
    """A blocking call with at most one thread: one that was left behind has to come back before there is another."""

    def __init__(
        self, call: Callable[[], T], deadline_s: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._call, self._deadline_s, self._clock = call, deadline_s, clock
        self._lock = threading.Lock()
        self._began_s: float | None = None

    async def __call__(self) -> T:
        """The result.  Raises what the call raises, and TimeoutError while it hangs."""
        with self._lock:
            if self._began_s is not None:
                raise TimeoutError
            self._began_s = self._clock()
        return await run_abandonable(self._run, self._deadline_s)

    @property
    def hanging_s(self) -> float:
        """For how long the call has been under way; 0: it is not."""
        with self._lock:
            return 0.0 if self._began_s is None else self._clock() - self._began_s

    def _run(self) -> T:
        try:
            return self._call()
        finally:
            with self._lock:
                self._began_s = None


class HealthMonitor:
    """What is known about the dependencies; belongs to one event loop."""

    def __init__(self, probes: Sequence[Probe] = (), *, secrets: Sequence[str] = ()) -> None:
        """``secrets`` are masked in what is shown."""
        self._probes, self._secrets = tuple(probes), tuple(secrets)
        self._views: dict[str, DependencyView] = {}
        self._changed = anyio.Event()
        for probe in self._probes:
            self.report(probe.name, "unknown", "not tried yet", required=probe.required)

    async def watch(self) -> None:
        """Tries every dependency again and again, until it is cancelled."""
        async with open_task_group() as tasks:
            for probe in self._probes:
                tasks.start_soon(self._watch, probe)

    def report(
        self,
        name: str,
        state: DependencyState,
        detail: str,
        *,
        required: bool = True,
        latency_s: float | None = None,
        expected: bool = False,
    ) -> None:
        """Notes how a dependency is; also one without a probe. A change of its state is logged.

        ``expected``: somebody wanted it so, and it is no error.
        """
        now, before = datetime.now(UTC).isoformat(timespec="milliseconds"), self._views.get(name)
        detail = shown_name(masked(detail, self._secrets))
        works, same = state in {"ok", "degraded"}, before is not None and before.state == state
        self._views[name] = DependencyView(
            name=name,
            state=state,
            required=required,
            detail=detail,
            latency_s=latency_s if latency_s is not None or before is None else before.latency_s,
            checked_at="" if state == "unknown" else now,
            last_success_at=now if works else before.last_success_at if before else "",
            since=before.since if same and before is not None else now,
        )
        self._changed.set()
        self._changed = anyio.Event()
        if not same and state != "unknown":
            bad = logging.WARNING if state == "degraded" else logging.ERROR
            level = logging.INFO if state == "ok" or expected else bad
            _log.log(level, "%s: %s: %s", name, state, detail)

    async def until_it_works(self, name: str) -> None:
        """Returns as soon as a dependency is found working."""
        while (view := self._views.get(name)) is None or view.state not in {"ok", "degraded"}:
            await self._changed.wait()

    def view(self, name: str) -> DependencyView | None:
        """One dependency."""
        return self._views.get(name)

    def readiness(self) -> Readiness:
        """All of them now; nothing is tried for it."""
        views = tuple(self._views.values())
        broken = [view for view in views if view.required and view.state not in {"ok", "degraded"}]
        troubled = [view for view in views if view.state != "ok"]
        summary = "; ".join(f"{view.name} {view.state}: {view.detail}" for view in troubled) or "everything works"
        return Readiness(not broken, summary, views)

    async def _watch(self, probe: Probe) -> None:
        while True:
            await self._try(probe)
            await anyio.sleep(probe.every_s)

    async def _try(self, probe: Probe) -> None:
        began_s = time.monotonic()
        state: DependencyState
        latency_s: float | None = None
        try:
            with anyio.fail_after(probe.deadline_s + 1):  # a blocking one has its own deadline
                finding = await probe.call()
            state, detail = finding.state, finding.detail
            latency_s = time.monotonic() - began_s
        except TimeoutError:
            blocking = probe.call if isinstance(probe.call, Blocking) else None
            hung_s = blocking.hanging_s if blocking else 0.0
            state, detail = "hanging", f"no answer within {seconds_text(max(probe.deadline_s, hung_s))}"
        except MoverError as error:
            state, detail, latency_s = "failed", str(error), time.monotonic() - began_s
        except Exception as error:  # noqa: BLE001 - whatever a dependency comes up with is how it is
            state, detail = "failed", f"{type(error).__name__}: {error}"
        self.report(probe.name, state, detail, required=probe.required, latency_s=latency_s)
