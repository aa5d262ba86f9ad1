"""Chromium without a window, as fixtures; a pytest plugin that ``conftest.py`` loads.

``chromium``        a browser of Playwright's for plain tests (``playwright.sync_api.Browser``).
``async_chromium``  the same for async tests (``playwright.async_api.Browser``).

The browser is the system's: Debian's package ``chromium``. Where it is missing, tests that use one of the two fail when
``CI`` is set, and are left out with a line in the report otherwise. Each test starts one of its own, in about a second:
Playwright's plain interface keeps an event loop running in its thread, next to which no async test runs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Iterator
from functools import cache
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from playwright.async_api import Browser as AsyncBrowser
    from playwright.sync_api import Browser

_FIXTURES: Final = {"chromium", "async_chromium"}
_OPTIONS: Final = (
    "--no-sandbox",  # root has none, and the pages are our own
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_LEFT_OUT = pytest.StashKey[int]()


@pytest.fixture
def chromium() -> Iterator[Browser]:
    program = _program()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
async def async_chromium(anyio_backend: object) -> AsyncIterator[AsyncBrowser]:  # noqa: ARG001 - it runs there
    program = _program()
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program, args=_OPTIONS)
        yield browser
        await browser.close()


@cache
def _installed() -> str | None:
    return shutil.which("chromium")


def _program() -> str:
    return _installed() or pytest.fail("Chromium is not installed: apt-get install chromium")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what needs a browser where there is none, unless this is CI."""
    if _installed() or os.environ.get("CI"):
        return
    left_out = [item for item in items if _FIXTURES & set(getattr(item, "fixturenames", ()))]
    if left_out:
        config.stash[_LEFT_OUT] = len(left_out)
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """The line that says so."""
    count = config.stash.get(_LEFT_OUT, 0)
    return [f"chromium is not installed; {count} tests need it and are left out"] if count else []
