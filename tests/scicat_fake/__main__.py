"""``python -m tests.scicat_fake``: a SciCat backend for development deployments, in memory or with a file.

``GET /api/v3/health`` answers when it is up, ``GET /`` shows datasets and jobs; ``control_routes`` has the controls
below ``/fake/``.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import socket
import sqlite3
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec

from tests.scicat_fake.app import ScicatApp
from tests.scicat_fake.keeper import Keeper
from tests.scicat_fake.seeding import seed_dataset, seed_job
from tests.scicat_fake.server import PASSWORD, USER, fresh_state, listening_socket, make_server
from tests.scicat_fake.state import State, Switches

__all__ = ["main"]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.scicat_fake", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (0.0.0.0 in a container)")
    parser.add_argument("--port", type=int, default=3000, help="0 takes a free one; the address is printed")
    account = parser.add_mutually_exclusive_group()
    account.add_argument("--user", default=USER, help="the archive's account, which may do everything")
    account.add_argument("--user-file", type=Path, help="the file that has its name")
    parser.add_argument("--password-file", type=Path, help=f"its password; without one it is {PASSWORD!r}")
    parser.add_argument("--state", type=Path, help="SQLite file that keeps documents over restarts")
    parser.add_argument("--job-action-url", action="append", default=[], help="told of each new job; may be repeated")
    parser.add_argument("--job-action-user", default="", help="name for Basic authentication there")
    parser.add_argument("--job-action-password-file", type=Path, help="and the password")
    parser.add_argument(
        "--seed", type=Path, help='JSON: {"datasets": [{"pid", "files": {path: bytes}}], "jobs": [...]}'
    )
    parser.add_argument("--switch", action="append", default=[], metavar="NAME=JSON", help="as PATCH /fake/switches")
    return parser.parse_args(argv)


def _secret(file: Path | None, otherwise: str) -> str:
    if file is None:
        return otherwise
    text = file.read_text(encoding="utf-8").strip()
    if not text:
        raise OSError(errno.ENODATA, "nothing in it", str(file))
    return text


def _switches(options: argparse.Namespace) -> Switches:
    given = {
        "job_action_urls": options.job_action_url,
        "job_action_user": options.job_action_user,
        "job_action_password": _secret(options.job_action_password_file, ""),
    }
    for text in options.switch:
        name, _, value = text.partition("=")
        given[name] = msgspec.json.decode(value)
    return msgspec.convert(given, Switches)


def _seed(state: State, file: Path) -> None:
    """Adds what the file names; datasets that are there already stay as they are, and jobs that somebody ordered."""
    wanted = msgspec.json.decode(file.read_bytes(), type=dict[str, list[dict[str, object]]])
    for dataset in wanted.get("datasets", []):
        if dataset["pid"] not in state.datasets:
            msgspec.convert(dataset["files"], dict[str, int])
            seed_dataset(state, **dataset)  # type: ignore[arg-type]
    if not state.jobs:
        for job in wanted.get("jobs", []):
            seed_job(state, **job)  # type: ignore[arg-type]


def _first_state(options: argparse.Namespace) -> State:
    """What the options say; the credentials are read again after a reset, as they may be others by then."""
    state = fresh_state(_secret(options.user_file, options.user), _secret(options.password_file, PASSWORD))
    state.switches = _switches(options)
    return state


async def _serve(app: ScicatApp, bound: socket.socket) -> None:
    await app.save()
    await make_server(app).serve([bound])


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until it is told to stop (SIGTERM, SIGINT)."""
    options = _arguments(argv)
    try:
        keeper = Keeper(options.state) if options.state else None
        app = ScicatApp(partial(_first_state, options), keeper)
        if keeper:
            keeper.load(app.state)
        if options.seed:
            _seed(app.state, options.seed)
        with listening_socket(options.host, options.port) as bound:
            host = f"[{options.host}]" if ":" in options.host else options.host
            sys.stdout.write(f"http://{host}:{bound.getsockname()[1]}\n")
            sys.stdout.flush()
            asyncio.run(_serve(app, bound))
    except (OSError, sqlite3.Error) as error:
        sys.stderr.write(f"scicat_fake: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
