"""Runs a Prefect worker as part of a deployment: ``python -m flows.worker --pool NAME``.

Waits for the work pool (``flows.configure`` makes it; a worker would make one without limit and template), hands the
credentials of the Prefect server to the runtime containers through a folder in memory, and becomes ``prefect worker
start``. ``--check`` asks the running worker whether it still polls, for a health check.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NoReturn

__all__ = ["hand_over", "main"]

_HEALTH_PORT: Final = "8080"  # Prefect's default for PREFECT_WORKER_WEBSERVER_PORT
_HEALTH_TIMEOUT_S: Final = 5.0
_POLL_S: Final = 2.0
_TELL_EVERY: Final = 15  # polls


def hand_over(environ: Mapping[str, str]) -> Path | None:
    """Puts the server's credentials where runtime containers find them; None when no folder is set for it.

    Raises:
        OSError: the file cannot be read, or the folder not be written to.
    """
    folder = environ.get("RUNTIME_SECRETS_FOLDER")
    source = environ.get("PREFECT_API_AUTH_STRING_FILE")
    if not folder or not source:
        return None
    target = Path(folder) / "prefectauth"
    data = Path(source).read_bytes()
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    return target


async def _wait_for_pool(name: str) -> None:
    """Returns once the server answers and has the pool; says now and then what it waits for."""
    import anyio

    polls = 0
    while True:
        reason = await _missing(name)
        if reason is None:
            return
        if polls % _TELL_EVERY == 0:
            sys.stderr.write(f"waiting: {reason}\n")
        polls += 1
        await anyio.sleep(_POLL_S)


async def _missing(name: str) -> str | None:
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    try:
        async with get_client() as client:
            await client.read_work_pool(name)
    except ObjectNotFound:
        return f"there is no work pool {name!r} yet; python -m flows.configure (prefect-config) makes it"
    except httpx.HTTPStatusError as error:
        return f"the Prefect server answers {error.response.status_code}"
    except httpx.HTTPError as error:
        return f"the Prefect server does not answer ({type(error).__name__})"
    return None


def _check() -> int:
    port = os.environ.get("PREFECT_WORKER_WEBSERVER_PORT") or _HEALTH_PORT
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=_HEALTH_TIMEOUT_S) as reply:
            sys.stdout.write(f"{reply.status}\n")
            return 0
    except (OSError, urllib.error.URLError) as error:
        sys.stdout.write(f"the worker does not poll: {error}\n")
        return 1


def _become_worker(pool: str) -> NoReturn:
    import anyio

    anyio.run(_wait_for_pool, pool)
    name = f"{pool} on {socket.gethostname()}"
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--name", name]
    # Ignored below a shell's `&`; the worker turns SIGTERM into it and would never end.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.execv(sys.executable, [*command, "--with-healthcheck"])  # noqa: S606 - becomes the worker, with its pid


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code, unless it becomes the worker."""
    parser = argparse.ArgumentParser(prog="python -m flows.worker", description="Runs a Prefect worker.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pool", metavar="NAME", help="work pool to serve")
    what.add_argument("--check", action="store_true", help="exit code 1 when the worker here does not poll")
    options = parser.parse_args(arguments)
    if options.check:
        return _check()
    try:
        hand_over(os.environ)
    except OSError as error:
        sys.stderr.write(f"{error.filename}: {error.strerror}\n")
        return 2
    _become_worker(options.pool)


if __name__ == "__main__":
    sys.exit(main())
