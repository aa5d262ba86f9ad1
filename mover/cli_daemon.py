"""Runs the daemon in the foreground: its log on stderr, its settings, the exit code."""

from __future__ import annotations

import logging
import os
import sys

import anyio

from mover.cli_run import Options, parse_assignments, report_error
from mover.settings import Settings, load_settings

__all__ = ["run_daemon"]

_CHATTY = ("httpx", "httpcore", "botocore", "aiobotocore", "aiohttp", "uvicorn", "asyncio", "litestar")


def run_daemon(options: Options) -> int:
    """Serves until it is told to stop; nothing is raised. Returns the exit code."""
    _log_to_stderr(verbose=options.verbose)

    def load() -> Settings:
        return load_settings(parse_assignments(options.assignments), config=options.config)

    secrets: tuple[str, ...] = ()
    try:
        from mover.daemon import serve
        from mover.daemon_memory import bound_arenas

        bound_arenas()
        settings = load()
        known = (settings.minio_password, settings.scicat_password)
        secrets = tuple(secret.reveal() for secret in known if secret is not None)
        anyio.run(serve, settings, load, backend_options={"use_uvloop": True})
    except Exception as error:  # noqa: BLE001 - the last stop: every failure becomes a line and an exit code
        return report_error(options, error, secrets)
    return 0


def _log_to_stderr(*, verbose: bool) -> None:
    """With times, unless the service manager adds them."""
    times = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s "
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format=f"{times}%(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("mover").setLevel(logging.DEBUG if verbose else logging.INFO)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
