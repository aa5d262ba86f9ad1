"""``python -m tests.scicat_fake``: a SciCat backend for development deployments, in memory or with a file.

``GET /api/v3/health`` answers when it is up; ``control_routes`` has the controls below ``/fake/``.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec
import uvicorn

from tests.scicat_fake.app import ScicatApp
from tests.scicat_fake.seeding import seed_dataset, seed_job
from tests.scicat_fake.server import PASSWORD, USER, fresh_state, listening_socket, make_server
from tests.scicat_fake.state import State, Switches, load_state, save_state

__all__ = ["main"]

_SAVE_EVERY_S = 1.0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.scicat_fake", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (0.0.0.0 in a container)")
    parser.add_argument("--port", type=int, default=3000, help="0 takes a free one; the address is printed")
    parser.add_argument("--user", default=USER, help="the archive's account, which may do everything")
    parser.add_argument("--password-file", type=Path, help=f"its password; without one it is {PASSWORD!r}")
    parser.add_argument("--state", type=Path, help="JSON file that keeps the documents over restarts")
    parser.add_argument("--job-action-url", action="append", default=[], help="told of each new job; may be repeated")
    parser.add_argument("--job-action-user", default="", help="name for Basic authentication there")
    parser.add_argument("--job-action-password-file", type=Path, help="and the password")
    parser.add_argument(
        "--seed", type=Path, help='JSON: {"datasets": [{"pid", "files": {path: bytes}}], "jobs": [...]}'
    )
    parser.add_argument("--switch", action="append", default=[], metavar="NAME=JSON", help="as PATCH /fake/switches")
    return parser.parse_args(argv)


def _secret(file: Path | None, otherwise: str) -> str:
    return otherwise if file is None else file.read_text(encoding="utf-8").strip()


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
    """Adds what the file names; datasets that are there already stay as they are."""
    wanted = msgspec.json.decode(file.read_bytes(), type=dict[str, list[dict[str, object]]])
    for dataset in wanted.get("datasets", []):
        if dataset["pid"] not in state.datasets:
            msgspec.convert(dataset["files"], dict[str, int])
            seed_dataset(state, **dataset)  # type: ignore[arg-type]
    for job in wanted.get("jobs", []):
        seed_job(state, **job)  # type: ignore[arg-type]


def _first_state(options: argparse.Namespace, password: str) -> State:
    state = fresh_state(options.user, password)
    state.switches = _switches(options)
    if options.state:
        load_state(state, options.state)
    if options.seed:
        _seed(state, options.seed)
    return state


async def _save_changes(app: ScicatApp, file: Path) -> None:
    saved: tuple[State, int] | None = None
    try:
        while True:
            if saved != (app.state, app.state.changes):
                saved = (app.state, app.state.changes)
                save_state(app.state, file)
            await asyncio.sleep(_SAVE_EVERY_S)
    finally:
        save_state(app.state, file)


async def _serve(app: ScicatApp, server: uvicorn.Server, bound: socket.socket, file: Path | None) -> None:
    async with asyncio.TaskGroup() as group:
        saving = group.create_task(_save_changes(app, file)) if file else None
        await server.serve([bound])
        if saving:
            saving.cancel()


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until it is told to stop (SIGTERM, SIGINT)."""
    options = _arguments(argv)
    app = ScicatApp(partial(_first_state, options, _secret(options.password_file, PASSWORD)))
    with listening_socket(options.host, options.port) as bound:
        host = f"[{options.host}]" if ":" in options.host else options.host
        sys.stdout.write(f"http://{host}:{bound.getsockname()[1]}\n")
        sys.stdout.flush()
        asyncio.run(_serve(app, make_server(app), bound, options.state))
    return 0


if __name__ == "__main__":
    sys.exit(main())
