"""The live page: complete without a script, safe with hostile names, and the same for a million datasets."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from html.parser import HTMLParser

import msgspec
import pytest

from mover.api import DatasetView, LimitView
from mover.daemon_health import HealthMonitor, Readiness
from mover.daemon_jobs import OwnerStatistics, QueueStatistics, WorkView
from mover.daemon_page import ASSETS, asset, render_login, render_page
from mover.daemon_page_parts import FailureNote, PageData
from mover.daemon_pages import Sessions
from mover.daemon_watchdog import LoopState
from mover.policies.space import SpaceReading
from tests.contrast import contrast, luminance

pytestmark = pytest.mark.anyio

HOSTILE = "20.500/<script>alert(1)</script>'\"><img src=x onerror=alert(2)>\x1b[31m\n&amp;"


class _Document(HTMLParser):
    """Elements with their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def _queue(working: tuple[WorkView, ...] = (), owners: int = 1) -> QueueStatistics:
    return QueueStatistics(
        jobs=2,
        queued=5,
        waiting=1,
        running=len(working),
        oldest_age_s=90.0,
        owners=tuple(OwnerStatistics(f"{HOSTILE}{number}", 5, 1, 2) for number in range(owners)),
        working=working,
        accepted=9,
        ended={},
        retries={},
        jobs_limit=100,
        datasets_limit=1000,
        intake_open=True,
    )


def _work(state: str = "running", reason: str = "") -> WorkView:
    view = DatasetView(HOSTILE, state, reason, 2, "", "move", 3, 50 << 20, 200 << 20, 6, 50)  # type: ignore[arg-type]
    return WorkView("job-1", "archive", HOSTILE, view, datetime.now(UTC).isoformat())


def _readiness() -> Readiness:
    monitor = HealthMonitor()
    monitor.report("s3", "ok", "three buckets", latency_s=0.02)
    monitor.report("lts", "hanging", f"no answer from {HOSTILE}")
    return monitor.readiness()


def _data(queue: QueueStatistics | None = None, **changes: object) -> PageData:
    data = PageData(
        host="transfer-1",
        now=datetime.now(UTC),
        uptime_s=100.0,
        readiness=_readiness(),
        loop=LoopState(0.001, 0.002, 5.0),
        rates={"archive": 123.4e6, "verify": 0.0, "retrieve": 0.0},
        queue=queue,
        work_rates=(42.0e6,),
        limits=(LimitView("MOVE_TO_LTS_LIMIT", 2, (HOSTILE,), 3, 2),),
        space=SpaceReading(1000 << 30, 300 << 30),
        floor_bytes=200 << 30,
        reserved_bytes=10 << 30,
        failures=(FailureNote("2026-01-02T03:04:05.678Z", "job-9", HOSTILE, f"broken: {HOSTILE}"),),
        guarded=True,
    )
    return msgspec.structs.replace(data, **changes)


async def test_all_that_is_going_on_is_there_without_a_script() -> None:
    text = _Document(render_page(_data(_queue((_work(),))))).text
    for said in (
        *("transfer-1", "not ready", "123.4 MB/s", "42.0 MB/s", "50.0 MiB of 200.0 MiB, 12% of the dataset"),
        *("move 3", "attempt 2"),
        *("MOVE_TO_LTS_LIMIT", "1 of 2", "3 waiting", "1000.0 GiB in all", "300.0 GiB", "has to stay free"),
        *(
            "5 dataset(s) queued",
            "the oldest that was not begun for 1:30 min",
            "three buckets",
            "20 ms",
            "hanging",
            "job-9",
            "broken:",
        ),
    ):
        assert said in text, said
    assert '<noscript><meta http-equiv="refresh"' in render_page(_data())


async def test_hostile_names_stay_text() -> None:
    page = render_page(_data(_queue((_work(), _work("waiting", HOSTILE)), owners=3)))
    document = _Document(page)
    assert document.all("img") == []
    assert [script["src"] for script in document.all("script")] == ["/page/mover.js"]
    assert {name for _, attributes in document.elements for name in attributes if name.startswith("on")} == set()
    assert "\x1b" not in document.text
    (bar,) = document.all("progress")
    assert bar["data-dataset"] == HOSTILE  # what the script compares with the events
    assert bar["value"] == "0.2500"


async def test_nothing_is_needed_that_the_policy_forbids() -> None:
    for page in (render_page(_data(_queue((_work(),)))), render_login("transfer-1", refused=True)):
        document = _Document(page)
        assert document.all("style") == []
        assert [attributes for _, attributes in document.elements if "style" in attributes] == []
        links = [str(item.get("href") or item.get("src") or item.get("action")) for _, item in document.elements]
        assert [link for link in links if link != "None" and not link.startswith(("/", "#", "data:,"))] == []
    for name, _ in ASSETS.values():
        assert "http" not in re.sub(r"http-equiv", "", asset(name))


async def test_every_part_that_the_script_replaces_has_a_name_of_its_own() -> None:
    document = _Document(render_page(_data(_queue((_work(),)), loop=LoopState(0.0, 0.0, 5.0, blocked=1))))
    names = [attributes["id"] for _, attributes in document.elements if "id" in attributes]
    assert len(names) == len(set(names))
    assert {"head", "main", "who", "state", "rates", "offline", "work", "limits", "space", "queue", "uptime"} <= set(
        names
    )
    assert all(
        str(link.get("id")).startswith("failure-") for link in document.all("a") if "/jobs/" in str(link["href"])
    )
    for section in document.all("section"):
        assert section["aria-labelledby"] in names
    assert all(item["aria-label"] for item in document.all("progress"))


TEXTS = (
    *(("good", "good-paper"), ("warn", "warn-paper"), ("bad", "bad-paper"), ("soft", "idle-paper")),
    *(("accent", "idle-paper"), ("accent", "card"), ("accent", "paper"), ("soft", "card"), ("soft", "paper")),
    *(("ink", "card"), ("ink", "paper"), ("ink", "bad-paper"), ("ink", "warn-paper"), ("card", "accent")),
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_every_text_stands_out_from_its_background(scheme: str) -> None:
    light, dark = asset("daemon_page.css").partition("* {")[0].split("@media")
    colours = dict(re.findall(r"--([a-z-]+): #([0-9a-f]+);", light if scheme == "light" else f"{light}{dark}"))
    seen = {}
    for name, digits in colours.items():
        pairs = re.findall("..", "".join(digit * 2 for digit in digits) if len(digits) == 3 else digits)
        seen[name] = luminance(*(int(pair, 16) for pair in pairs))
    assert [(ink, paper) for ink, paper in TEXTS if contrast(seen[ink], seen[paper]) < 4.5] == []


async def test_before_there_is_an_engine_the_page_says_so() -> None:
    text = _Document(render_page(_data(None, space=None, limits=(), failures=()))).text
    assert "engine is not open yet" in text
    assert "not ready" in text


async def test_the_page_stays_small_however_much_there_is() -> None:
    many = tuple(_work() for _ in range(2000))
    limits = (LimitView("MOVE_TO_LTS_LIMIT", 1000, ("x.tar",) * 1000, 5, 1000),)
    page = render_page(_data(_queue(many, owners=2000), work_rates=(1.0,) * 2000, limits=limits))
    assert len(page) < 150_000
    assert "and 1,950 more" in page


async def test_a_session_ends_with_its_time_and_is_no_token() -> None:
    now_s = 0.0
    sessions = Sessions(clock=lambda: now_s)
    number = sessions.begin("the-token")
    assert "the-token" not in number
    assert sessions.token(number) == "the-token"
    assert sessions.token(number + "x") == ""
    now_s = 12 * 3600.0
    assert sessions.token(number) == ""
    for _ in range(2000):
        sessions.begin("the-token")
    assert len(sessions._tokens) == 1000  # noqa: SLF001
