"""The browser of the tests runs scripts, for plain and for async tests in one session."""

from __future__ import annotations

import pytest
from playwright.async_api import Browser as AsyncBrowser
from playwright.sync_api import Browser

PAGE = "<p id=said>still</p><script>document.getElementById('said').textContent = 'moved'</script>"


def test_a_page_shows_what_its_script_made(chromium: Browser) -> None:
    page = chromium.new_page()
    page.set_content(PAGE)
    assert page.inner_text("#said") == "moved"


@pytest.mark.anyio
async def test_an_async_test_has_one_too_after_a_plain_one(async_chromium: AsyncBrowser) -> None:
    page = await async_chromium.new_page()
    await page.set_content(PAGE)
    assert await page.inner_text("#said") == "moved"


def test_a_plain_one_works_after_an_async_one(chromium: Browser) -> None:
    assert chromium.is_connected()
