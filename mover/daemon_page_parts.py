"""The sections of the live page. Everything that comes from outside is escaped here: ids, owners, reasons, names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from zlib import crc32

import msgspec

from mover.api import LimitView
from mover.daemon_health import DependencyView, Readiness
from mover.daemon_jobs import OwnerStatistics, QueueStatistics, WorkView
from mover.daemon_watchdog import LoopState
from mover.policies.space import SpaceReading
from mover.shown import bytes_text, seconds_text, shown_name

__all__ = ["FailureNote", "PageData", "rate_cell", "sections", "text_of", "time_of"]

_SHOWN_WORK = 50
_SHOWN_OWNERS = 30
_SHOWN_HOLDERS = 8
_GAUGE_WIDTH = 1000


class FailureNote(msgspec.Struct, frozen=True):
    """A dataset that failed."""

    at: str
    job_id: str
    dataset_id: str
    reason: str


class PageData(msgspec.Struct, frozen=True):
    """All that the page shows. ``rates``: bytes per second by direction; ``work_rates``: of each line of work.

    ``queue`` is None as long as there is no engine. ``guarded``: the reader has logged in, and may leave.
    """

    host: str
    now: datetime
    uptime_s: float
    readiness: Readiness
    loop: LoopState
    rates: dict[str, float]
    queue: QueueStatistics | None
    work_rates: tuple[float, ...]
    limits: tuple[LimitView, ...]
    space: SpaceReading | None
    floor_bytes: int
    reserved_bytes: int
    failures: tuple[FailureNote, ...]
    guarded: bool


def sections(data: PageData) -> str:
    """All sections, one after another."""
    parts = (_work(data), _limits(data.limits), _space(data), _queue(data.queue), _dependencies(data), _failures(data))
    return "".join(parts)


def text_of(value: object) -> str:
    """A text from outside, on one line and escaped."""
    return escape(shown_name(str(value)))


def rate_cell(bytes_per_s: float) -> str:
    """Megabytes per second."""
    return f"{bytes_per_s / 1e6:,.1f} MB/s"


def time_of(at: str) -> str:
    """Hours and minutes of today, else the day, too."""
    if not at:
        return ""
    when = datetime.fromisoformat(at).astimezone(UTC)
    today = when.date() == datetime.now(UTC).date()
    text = when.strftime("%H:%M:%S" if today else "%d %b %H:%M")
    return f'<time datetime="{escape(at)}">{text}</time>'


def _section(name: str, title: str, content: str, *, small: str = "", width: str = "") -> str:
    small = f" <small>{small}</small>" if small else ""
    return (
        f'<section class="card {width}" id="{name}" aria-labelledby="{name}-title">'
        f'<h2 id="{name}-title">{title}{small}</h2>{content}</section>'
    )


def _table(name: str, columns: Sequence[str], rows: Iterable[str]) -> str:
    heads = "".join(
        f'<th scope="col"{" class=number" if column.endswith(">") else ""}>{column.rstrip(">")}</th>'
        for column in columns
    )
    return (
        f'<div class="scroll" id="{name}-table" tabindex="0" role="region" aria-labelledby="{name}-title">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _work(data: PageData) -> str:
    if data.queue is None:
        return _section("work", "Now", '<p class="soft">The engine is not open yet; accepted jobs wait for it.</p>')
    if not data.queue.working:
        return _section("work", "Now", '<p class="soft">Nothing runs.</p>')
    lines = list(zip(data.queue.working, data.work_rates, strict=False))[:_SHOWN_WORK]
    hidden = len(data.queue.working) - len(lines)
    rows = [_work_row(work, rate) for work, rate in lines]
    if hidden:
        rows.append(f'<tr><td colspan="6" class="soft">and {hidden:,} more</td></tr>')
    columns = ("dataset", "job", "stage", "progress", "rate>", "since")
    small = f"{data.queue.running:,} running, {data.queue.waiting:,} waiting"
    return _section("work", "Now", _table("work", columns, rows), small=small)


def _work_row(work: WorkView, rate: float) -> str:
    view = work.dataset
    stage = f"{text_of(view.stage)} {view.datablock or ''}".strip()
    state = f'<span class="pill {view.state}">{view.state}</span>'
    if view.state == "waiting" or (view.reason and not view.total_bytes):
        progress = f'<td class="reason">{text_of(view.reason)}</td>'
    else:
        share = min(view.done_bytes / view.total_bytes, 1.0) if view.total_bytes else 0.0
        done = f"{bytes_text(view.done_bytes)} of {bytes_text(view.total_bytes)}"
        if view.work_total_bytes:
            done += f", {100 * view.work_done_bytes // view.work_total_bytes}% of the dataset"
        label = f"{view.stage or 'progress'} of {view.dataset_id}"
        progress = (
            f'<td class="bar"><progress max="1" value="{share:.4f}" aria-label="{text_of(label)}"'
            f' data-job="{text_of(work.job_id)}" data-dataset="{escape(view.dataset_id)}"'
            f' data-stage="{text_of(view.stage)}"></progress><span class="under">{done}</span></td>'
        )
    attempt = f'<span class="under">attempt {view.attempt}</span>' if view.attempt > 1 else ""
    return (
        f'<tr><td class="name">{text_of(view.dataset_id)}</td>'
        f'<td>{work.kind}<span class="under">for {text_of(work.owner)}</span></td>'
        f"<td>{state}<span class='under'>{stage}</span>{attempt}</td>{progress}"
        f'<td class="number">{rate_cell(rate) if rate else ""}</td><td>{time_of(work.since)}</td></tr>'
    )


def _limits(limits: Sequence[LimitView]) -> str:
    if not limits:
        return ""
    cells = "".join(_limit(limit) for limit in limits)
    return _section("limits", "Limits", f'<ul class="limits">{cells}</ul>')


def _limit(limit: LimitView) -> str:
    held = len(limit.holders)
    marks = "".join(
        f"<li{' class=held' if index < held else ''}></li>" for index in range(min(max(limit.slots, held), 64))
    )
    names = "".join(f'<li class="name">{text_of(holder)}</li>' for holder in limit.holders[:_SHOWN_HOLDERS])
    if held > _SHOWN_HOLDERS:
        names += f"<li>and {held - _SHOWN_HOLDERS:,} more</li>"
    waiting = f'<p class="holders soft">{limit.waiting:,} waiting</p>' if limit.waiting else ""
    idle = "" if held or limit.waiting else '<p class="holders soft">free</p>'
    return (
        f"<li><h3>{text_of(limit.name)}<span>{held} of {limit.slots}</span></h3>"
        f'<ul class="slots" aria-hidden="true">{marks}</ul><ul class="holders">{names}</ul>{waiting}{idle}</li>'
    )


def _space(data: PageData) -> str:
    if data.space is None:
        return _section("space", "Space on the LTS", '<p class="soft">Not known yet.</p>', width="half")
    total, free = data.space.total_bytes, data.space.free_bytes
    used = max(total - free, 0)
    scale = _GAUGE_WIDTH / max(total, 1)
    at_floor = _GAUGE_WIDTH - data.floor_bytes * scale
    picture = (
        f'<svg class="gauge" viewBox="0 0 {_GAUGE_WIDTH} 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="used" height="10" width="{used * scale:.1f}"/>'
        f'<rect class="reserved" height="10" x="{used * scale:.1f}" width="{data.reserved_bytes * scale:.1f}"/>'
        f'<line class="floor" x1="{at_floor:.1f}" x2="{at_floor:.1f}" y1="0" y2="10"/></svg>'
    )
    numbers = (
        ("used", "used", used),
        ("reserved", "reserved", data.reserved_bytes),
        ("free", "free", free),
        ("floor", "has to stay free", data.floor_bytes),
    )
    key = "".join(
        f'<div class="{name}"><dt>{text}</dt><dd>{bytes_text(size)}</dd></div>' for name, text, size in numbers
    )
    content = f'{picture}<dl class="key">{key}</dl>'
    return _section("space", "Space on the LTS", content, small=f"{bytes_text(total)} in all", width="half")


def _queue(queue: QueueStatistics | None) -> str:
    if queue is None:
        return _section("queue", "Queue", '<p class="soft">Not known before the engine is open.</p>', width="half")
    if not queue.owners:
        return _section("queue", "Queue", '<p class="soft">Nothing waits for its turn.</p>', width="half")
    rows = [_owner(owner) for owner in queue.owners[:_SHOWN_OWNERS]]
    if len(queue.owners) > _SHOWN_OWNERS:
        rows.append(f'<tr><td colspan="4" class="soft">and {len(queue.owners) - _SHOWN_OWNERS:,} more</td></tr>')
    small = f"{queue.queued:,} dataset(s) queued, {queue.jobs:,} job(s) not finished"
    if queue.oldest_age_s:
        small += f", the oldest that was not begun for {seconds_text(queue.oldest_age_s)}"
    content = _table("queue", ("owner", "queued>", "waiting>", "running>"), rows)
    return _section("queue", "Queue by owner", content, small=small, width="half")


def _owner(owner: OwnerStatistics) -> str:
    numbers = "".join(f'<td class="number">{count:,}</td>' for count in (owner.queued, owner.waiting, owner.running))
    return f'<tr><td class="name">{text_of(owner.owner)}</td>{numbers}</tr>'


def _dependencies(data: PageData) -> str:
    rows = [_dependency(view) for view in data.readiness.dependencies]
    content = _table("needs", ("dependency", "state", "latency>", "worked last", "what is seen"), rows)
    return _section("needs", "Dependencies", content)


def _dependency(view: DependencyView) -> str:
    latency = "" if view.latency_s is None else f"{view.latency_s * 1000:,.0f} ms"
    optional = "" if view.required else '<span class="under">not required</span>'
    return (
        f'<tr><td>{text_of(view.name)}{optional}</td><td><span class="pill {view.state}">{view.state}</span></td>'
        f'<td class="number">{latency}</td><td>{time_of(view.last_success_at) or "never"}</td>'
        f'<td class="reason">{text_of(view.detail)}</td></tr>'
    )


def _failures(data: PageData) -> str:
    if not data.failures:
        return _section("failures", "Last failures", '<p class="soft">None since the daemon was started.</p>')
    rows = [_failure(note) for note in data.failures]
    return _section("failures", "Last failures", _table("failures", ("at", "dataset", "job", "reason"), rows))


def _failure(note: FailureNote) -> str:
    job_id = text_of(note.job_id)
    name = f"failure-{job_id}-{crc32(note.dataset_id.encode()):08x}"  # the focus finds it again in a newer table
    return (
        f'<tr><td>{time_of(note.at)}</td><td class="name">{text_of(note.dataset_id)}</td>'
        f'<td class="name"><a id="{name}" href="/v1/jobs/{job_id}">{job_id}</a></td>'
        f'<td class="reason">{text_of(note.reason)}</td></tr>'
    )
