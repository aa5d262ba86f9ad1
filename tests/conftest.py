"""What every test gets: no settings from the shell, one async backend, and a guard against a blocked event loop."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
from blockbuster import BlockBuster, BlockBusterFunction

import mover

pytest_plugins = [
    "tests.prefect_servers",
    "tests.scicat_fake.fixtures",
    "tests.servers",
    "tests.flow_world",
    "tests.deployments",
    "tests.browsers",
]

_MOVER = str(Path(mover.__file__).parent) + os.sep
_PREFECT = f"{os.sep}site-packages{os.sep}prefect{os.sep}"
_SETTINGS = ("ARCHIVER_", "LTS_", "MINIO_", "MOVER_", "MOVE_TO_LTS_", "SCICAT_", "VERIFY_LTS_", "AWS_")
_FILE_CALLS = ("fdatasync", "fsync", "ftruncate", "open", "posix_fallocate", "pread", "preadv", "pwrite", "pwritev")
# botocore reads its service descriptions the first time a client is made; imports stand where they are used.
_MAY_BLOCK = (
    ("botocore/loaders.py", {"exists", "load_file", "list_available_services", "list_api_versions", "load_data"}),
    ("botocore/configloader.py", {"raw_config_parse"}),
    ("botocore/httpsession.py", {"get_cert_path", "where"}),
    ("aiobotocore/session.py", {"_create_client"}),
    ("prometheus_client/process_collector.py", {"collect"}),  # files of /proc are memory
    ("<frozen importlib._bootstrap>", {"_find_and_load"}),
)


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """Async tests run on asyncio in debug mode."""
    return "asyncio", {"debug": True}


@pytest.fixture(autouse=True)
def _no_settings_from_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(_SETTINGS):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _loop_guard(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails an async test in which a coroutine of the mover blocks the loop; tests themselves may read a file."""
    if "anyio_backend" not in request.fixturenames:
        yield
        return
    guard = BlockBuster([mover])
    for name in [name for name in guard.functions if name.startswith("threading.Lock")]:
        del guard.functions[name]  # queues and loggers hold theirs for microseconds
    for call in _FILE_CALLS:
        guard.functions[f"os.{call}"] = BlockBusterFunction(None, f"os.{call}", scanned_modules=[mover])
    for function in guard.functions.values():
        function.can_block_predicate = _allowed(function.can_block_predicate)
        function.can_block_functions.extend(_MAY_BLOCK)
    guard.activate()
    try:
        yield
    finally:
        guard.deactivate()


def _allowed(predicate: Callable[..., bool]) -> Callable[..., bool]:
    def allowed(*args: object, **kwargs: object) -> bool:
        return not _in_coroutine_of_mover() or predicate(*args, **kwargs)

    return allowed


def _in_coroutine_of_mover() -> bool:
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - inspect.stack() reads files
    kinds = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
    while frame is not None:
        code = frame.f_code
        if _PREFECT in code.co_filename:  # it reads its own files where it likes
            return False
        if code.co_flags & kinds and code.co_filename.startswith(_MOVER):
            return True
        frame = frame.f_back
    return False
