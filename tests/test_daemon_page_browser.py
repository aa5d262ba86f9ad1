"""The live page in a real Chromium: up to date by itself, by keyboard, in the dark, without scripts, behind a login."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, expect

from tests.contrast import contrast, luminance
from tests.daemon_process import DaemonProcess, World, world
from tests.datasets import random_bytes
from tests.servers import S3Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

DATASET, LOST = "20.500.11935/on-its-way", "20.500.11935/<b>lost</b>"
OPERATOR = "operator-token-0123456789"
PATIENCE_MS = 20_000
STEP_BYTES, PAUSE_S = 16 << 10, 0.03  # half a megabyte a second on each connection


@pytest.fixture
def place(tmp_path: Path, moto_server: S3Server) -> Iterator[World]:
    with world(tmp_path, moto_server) as made:
        yield made


class _SlowLine(socketserver.ThreadingTCPServer):
    """Forwards connections; what comes back is slow once it is long."""

    daemon_threads = block_on_close = True
    allow_reuse_address = True

    def __init__(self, upstream_url: str) -> None:
        parts = urlsplit(upstream_url)
        self.upstream = (parts.hostname or "", parts.port or 0)
        self.over = threading.Event()
        super().__init__(("127.0.0.1", 0), _Forward)


class _Forward(socketserver.BaseRequestHandler):
    server: _SlowLine

    def handle(self) -> None:
        with suppress(OSError), socket.create_connection(self.server.upstream) as upstream:  # either end may go
            back = threading.Thread(target=self._slowly, args=(upstream, self.request), daemon=True)
            back.start()
            while data := self.request.recv(1 << 16):
                upstream.sendall(data)
            upstream.shutdown(socket.SHUT_WR)
            back.join()

    def _slowly(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(STEP_BYTES):
                target.sendall(data)
                if len(data) == STEP_BYTES:
                    self.server.over.wait(PAUSE_S)


@contextmanager
def slow_line(server: S3Server) -> Iterator[str]:
    with _SlowLine(server.endpoint_url) as line:
        thread = threading.Thread(target=line.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{line.server_address[1]}"
        finally:
            line.over.set()
            line.shutdown()


class Look:
    """A page of the daemon's, with all that the browser complains about and asks for."""

    def __init__(self, context: BrowserContext, daemon: DaemonProcess, path: str = "/") -> None:
        self.said: list[str] = []
        self.asked: list[Request] = []
        self._daemon = daemon
        self.page: Page = context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request))  # noqa: PLW0108 - it marks what it is given
        self.page.goto(f"{daemon.url}{path}")

    def expect_nothing_odd(self) -> None:
        assert self.said == []
        assert {request.url.partition("/page/")[0].rstrip("/") for request in self.asked} >= {self._daemon.url}
        elsewhere = [item.url for item in self.asked if not item.url.startswith((f"{self._daemon.url}/", "data:"))]
        assert elsewhere == []

    def until(self, condition: str) -> None:
        """Polls from outside: the page's policy forbids what is evaluated inside."""
        deadline_s = time.monotonic() + PATIENCE_MS / 1000
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline_s, condition
            self.page.wait_for_timeout(50)

    def focused(self) -> str:
        return str(self.page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))

    def outlined(self) -> bool:
        style = "getComputedStyle(document.activeElement)"
        shown: bool = self.page.evaluate(f"parseFloat({style}.outlineWidth) > 1 && {style}.outlineStyle !== 'none'")
        return shown


def order_failure(daemon: DaemonProcess) -> str:
    job_id = daemon.order("retrieve", LOST)
    daemon.until_job(job_id, "failed")
    return job_id


def test_running_work_is_shown_and_moves_by_itself_without_the_page_being_loaded_again(
    place: World, chromium: Browser
) -> None:
    place.put(DATASET, {"x": random_bytes(12 << 20, 1)})
    with slow_line(place.server) as url, place.daemon(MINIO_ENDPOINT=url) as daemon:
        daemon.until_ready()
        look = Look(chromium.new_context(), daemon)
        page = look.page
        expect(page.locator("#work")).to_contain_text("Nothing runs.")
        page.evaluate("window.loadedOnce = true")
        before = page.inner_text("#uptime")
        job_id = daemon.order("archive", DATASET)
        bar = page.locator("#work progress")
        expect(bar).to_have_count(1, timeout=PATIENCE_MS)
        expect(page.locator("#work")).to_contain_text(DATASET)
        # Attributes of one bar that stays: what the page fetches replaces the whole section.
        page.evaluate(
            "() => { window.moves = 0; new MutationObserver((all) => { window.moves += all.length; }).observe("
            "document.getElementById('main'), {subtree: true, attributes: true, attributeFilter: ['value']}); }"
        )
        look.until("window.moves >= 3")
        expect(page).to_have_title("1 running · mover on " + socket.gethostname(), timeout=PATIENCE_MS)
        assert daemon.until_job(job_id, "done", "failed")["state"] == "done"
        expect(page.locator("#work")).to_contain_text("Nothing runs.", timeout=PATIENCE_MS)
        expect(page.locator("#uptime")).not_to_have_text(before, timeout=PATIENCE_MS)
        assert page.evaluate("window.loadedOnce") is True
        assert [request.resource_type for request in look.asked].count("eventsource") == 1
        look.expect_nothing_odd()


def test_a_change_is_shown_sooner_than_the_page_would_look_by_itself(place: World, chromium: Browser) -> None:
    with place.daemon() as daemon:
        daemon.until_ready()
        look = Look(chromium.new_context(), daemon)
        with look.page.expect_response(lambda reply: reply.request.resource_type == "fetch", timeout=PATIENCE_MS):
            pass
        began_s = time.monotonic()
        order_failure(daemon)
        expect(look.page.locator("#failures")).to_contain_text(LOST, timeout=PATIENCE_MS)
        assert time.monotonic() - began_s < 4.5  # it looks every 5 s
        assert look.page.locator("#failures b").count() == 0
        look.expect_nothing_odd()


def test_the_keyboard_reaches_everything_visibly_and_keeps_its_place_when_the_page_changes(
    place: World, chromium: Browser
) -> None:
    with place.daemon() as daemon:
        daemon.until_ready()
        first = order_failure(daemon)
        look = Look(chromium.new_context(), daemon)
        page = look.page
        reached = []
        for _ in range(12):
            page.keyboard.press("Tab")
            assert look.outlined(), look.focused()
            reached.append(look.focused())
            if reached[-1] == "metrics":
                break
        assert reached[0] == "Skip to the content"
        assert [name.partition(f"-{first}")[0] for name in reached[1:]] == [
            *("needs-table", "failures-table", "failure", "interface", "readiness", "metrics")
        ]
        page.locator("[id^=failure-]").focus()
        focused = look.focused()
        for count in (2, 3):
            order_failure(daemon)
            expect(page.locator("[id^=failure-]")).to_have_count(count, timeout=PATIENCE_MS)
            assert look.focused() == focused
        look.expect_nothing_odd()
        page.keyboard.press("Enter")
        page.wait_for_url(f"**/v1/jobs/{first}")
        page.go_back()
        page.locator(".skip").focus()
        page.keyboard.press("Enter")
        assert look.focused() == "main"


def test_what_has_the_focus_and_goes_leaves_it_where_it_was(place: World, chromium: Browser) -> None:
    with place.daemon() as daemon:
        daemon.until_ready()
        order_failure(daemon)
        look = Look(chromium.new_context(), daemon)
        look.page.locator("[id^=failure-]").focus()
        assert look.focused().startswith("failure-")
        for _ in range(15):  # so many are shown
            order_failure(daemon)
        look.until("!document.activeElement.id.startsWith('failure-')")
        assert look.focused() == "failures-table"
        look.expect_nothing_odd()


def test_light_and_dark_are_as_the_reader_prefers(place: World, chromium: Browser) -> None:
    with place.daemon() as daemon:
        daemon.until_ready()
        colours = {}
        for scheme in ("light", "dark"):
            look = Look(chromium.new_context(color_scheme=scheme), daemon)
            for part in ("body", "#needs", ".pill"):
                style = f"getComputedStyle(document.querySelector('{part}'))"
                colours[scheme, part] = look.page.evaluate(f"[{style}.backgroundColor, {style}.color]")
            look.expect_nothing_odd()
    for part in ("body", "#needs", ".pill"):
        assert colours["light", part][0] != colours["dark", part][0]
        for scheme in ("light", "dark"):
            paper, ink = (_lightness(colour) for colour in colours[scheme, part])
            assert (paper > ink) == (scheme == "light")
            assert contrast(paper, ink) >= 4.5, (scheme, part)


def _lightness(colour: str) -> float:
    """Of ``rgb(r, g, b)``."""
    red, green, blue = (int(part) for part in colour.partition("(")[2].rstrip(")").split(", ")[:3])
    return luminance(red, green, blue)


def test_on_a_small_screen_tables_scroll_by_themselves_and_names_stay_legible(place: World, chromium: Browser) -> None:
    with place.daemon() as daemon:
        daemon.until_ready()
        order_failure(daemon)
        look = Look(chromium.new_context(viewport={"width": 400, "height": 800}), daemon)
        assert look.page.evaluate("document.documentElement.scrollWidth <= innerWidth") is True
        assert (
            look.page.evaluate("Math.min(...[...document.querySelectorAll('td.name')].map((e) => e.offsetWidth))") > 150
        )
        look.expect_nothing_odd()


def test_without_scripts_the_page_is_whole_and_asks_again_by_itself(place: World, chromium: Browser) -> None:
    with place.daemon() as daemon:
        daemon.until_ready()
        look = Look(chromium.new_context(java_script_enabled=False), daemon)
        expect(look.page.locator("#failures")).to_contain_text("None since")
        order_failure(daemon)
        expect(look.page.locator("#failures")).to_contain_text(LOST, timeout=PATIENCE_MS)  # every 5 s
        for part in ("#work", "#limits", "#space", "#queue", "#needs"):
            expect(look.page.locator(part)).to_be_visible()
        look.expect_nothing_odd()


def test_a_token_opens_the_page_by_keyboard_and_the_way_out_closes_it(place: World, chromium: Browser) -> None:
    tokens = place.folder / "tokens"
    tokens.write_text(f"olga:operate:{OPERATOR}")
    tokens.chmod(0o600)
    with place.daemon(MOVER_TOKEN_FILE=str(tokens)) as daemon:
        daemon.until_ready()
        context = chromium.new_context()
        look = Look(context, daemon)
        page = look.page
        assert page.url.endswith("/login")
        assert look.focused() == "token"
        page.keyboard.type("not-the-token-0123456789")
        page.keyboard.press("Enter")
        expect(page.locator("[role=alert]")).to_have_text("This is no token of this daemon.")
        assert look.said.pop().startswith("error: Failed to load resource: the server responded with a status of 403")
        look.until("document.activeElement.id === 'token'")
        page.keyboard.type(OPERATOR)
        page.keyboard.press("Tab")
        assert look.focused() == "Log in"
        assert look.outlined()
        page.keyboard.press("Enter")
        expect(page.locator("#work")).to_be_visible()
        while "eventsource" not in [request.resource_type for request in look.asked]:
            page.wait_for_timeout(50)
        assert OPERATOR not in str(context.cookies())
        look.expect_nothing_odd()
        page.locator("form.leave button").focus()
        page.keyboard.press("Enter")
        page.wait_for_url("**/login")
        page.goto(f"{daemon.url}/")
        assert page.url.endswith("/login")
        look.expect_nothing_odd()


def test_a_daemon_that_is_gone_is_told_and_one_that_is_back_is_shown_again(place: World, chromium: Browser) -> None:
    with place.daemon() as daemon:
        daemon.until_ready()
        look = Look(chromium.new_context(), daemon)
        daemon.stop()
        expect(look.page.locator("#offline")).to_contain_text("No answer from the daemon", timeout=PATIENCE_MS)
    with place.daemon() as daemon:
        daemon.until_ready()
        expect(look.page.locator("#offline")).to_be_hidden(timeout=PATIENCE_MS)
        order_failure(daemon)
        expect(look.page.locator("#failures")).to_contain_text(LOST, timeout=PATIENCE_MS)
