"""The server as fixtures; a pytest plugin that ``conftest.py`` loads.

``scicat_server``  a real HTTP server on loopback with an empty catalogue, for one test.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.scicat_fake.server import ScicatServer, running_server

__all__ = ["scicat_server"]


@pytest.fixture(scope="session")
def _scicat_thread() -> Iterator[ScicatServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def scicat_server(_scicat_thread: ScicatServer) -> Iterator[ScicatServer]:
    _scicat_thread.control.reset()
    yield _scicat_thread
    _scicat_thread.control.reset()  # lets held requests go
