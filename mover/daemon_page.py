"""The live page as HTML: one renderer for the first look and for what the script fetches later."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from string import Template

from mover import __version__
from mover.daemon_page_parts import PageData, rate_cell, sections, text_of, time_of
from mover.shown import seconds_text

__all__ = ["ASSETS", "asset", "render_login", "render_page"]

ASSETS = {"mover.css": ("daemon_page.css", "text/css"), "mover.js": ("daemon_page.js", "text/javascript")}
"""Files that the page uses: their names in the package, and media types."""


@cache
def asset(name: str) -> str:
    """A file of the page, by its name in the package."""
    return files("mover").joinpath(name).read_text(encoding="utf-8")


def render_page(data: PageData) -> str:
    """The whole page."""
    running = data.queue.running if data.queue else 0
    title = f"{running} running · mover on {data.host}" if data.readiness.ready else f"not ready · mover on {data.host}"
    body = (
        f'<header id="head">{_head(data)}</header>'
        '<main id="main" tabindex="-1">' + _notices(data) + sections(data) + "</main>" + _footer(data)
    )
    head = '<noscript><meta http-equiv="refresh" content="5"></noscript>\n<script src="/page/mover.js" defer></script>'
    return Template(asset("daemon_page.html")).substitute(title=text_of(title), head=head, body=body)


def render_login(host: str, *, refused: bool = False) -> str:
    """The form that asks for a token."""
    said = '<p class="notice" role="alert">This is no token of this daemon.</p>' if refused else ""
    body = (
        '<main id="main"><form class="card login" method="post" action="/login">'
        f"<h1>mover <small>on {text_of(host)}</small></h1>{said}"
        '<input type="text" name="name" value="mover" autocomplete="username" hidden>'
        '<label for="token">Token of the daemon</label>'
        '<input id="token" name="token" type="password" required autofocus autocomplete="current-password"'
        ' spellcheck="false" maxlength="1000"><button type="submit">Log in</button>'
        '<p class="soft">The page can be read with it for twelve hours; nothing can be ordered from here.</p>'
        "</form></main>"
    )
    return Template(asset("daemon_page.html")).substitute(title="mover: log in", head="", body=body)


def _head(data: PageData) -> str:
    state, words = ("ok", "ready") if data.readiness.ready else ("failed", "not ready")
    if data.queue is not None and not data.queue.intake_open:
        state, words = "degraded", "stopping"
    elif data.readiness.ready and any(view.state != "ok" for view in data.readiness.dependencies):
        state, words = "degraded", "ready, with a drawback"
    rates = "".join(f"<div><dt>{name}</dt><dd>{rate_cell(rate)}</dd></div>" for name, rate in data.rates.items())
    return (
        f'<h1 id="who">mover <small>on {text_of(data.host)}</small></h1>'
        f'<p id="state" role="status"><span class="pill {state}">{words}</span></p>'
        f'<dl id="rates" class="rates push">{rates}</dl>'
    )


def _notices(data: PageData) -> str:
    notices = ['<p class="notice" id="offline" role="status" hidden></p>']
    if not data.readiness.ready:
        notices.append(f'<p class="notice" id="unready">{text_of(data.readiness.summary)}</p>')
    if data.queue is not None and data.queue.journal_error:
        notices.append(f'<p class="notice" id="journal">Nothing is accepted: {text_of(data.queue.journal_error)}</p>')
    if data.loop.blocked:
        text = (
            f"The event loop was blocked {data.loop.blocked} time(s), last for {seconds_text(data.loop.last_blocked_s)}"
        )
        notices.append(
            f'<p class="notice mild" id="blocked">{text} at {time_of(data.loop.last_blocked_at)}'
            f" in {text_of(data.loop.last_blocked_in)}</p>"
        )
    return "".join(notices)


def _footer(data: PageData) -> str:
    leave = (
        '<form class="leave" method="post" action="/login/leave"><button>log out</button></form>'
        if data.guarded
        else ""
    )
    links = "".join(
        f'<a href="{path}">{text}</a>'
        for path, text in (("/schema", "interface"), ("/readyz", "readiness"), ("/metrics", "metrics"))
    )
    return (
        f'<footer id="foot"><span id="uptime">mover {__version__}, up for {seconds_text(data.uptime_s)}</span>'
        f"<span>times are UTC</span>{links}{leave}</footer>"
    )
