"""What every test gets: no settings from the shell, one async backend, and a guard against a blocked event loop."""

from __future__ import annotations

import pytest

pytest_plugins = ["tests.servers"]


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """Async tests run on asyncio in debug mode."""
    return "asyncio", {"debug": True}
