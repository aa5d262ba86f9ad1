"""Configures the Prefect server: ``python -m flows.configure [--check] [--config vars.toml ...] [--json]``.

Writes variables, limits, Secret blocks, work pools and automations, and nothing that is so already; everything is
checked before the first write. Exit codes: 0 done, or nothing differs; 1 the server does not answer, or ``--check``
found a difference; 2 the configuration is wrong.

Environment: PREFECT_API_URL; MINIO_USER_FILE, MINIO_PASSWORD_FILE, SCICAT_USER_FILE, SCICAT_PASSWORD_FILE,
GITHUB_OPENEM_USERNAME_FILE, GITHUB_OPENEM_ACCESS_TOKEN_FILE (files with what the Secret blocks shall hold);
REGISTRY_URL (which docker workers log in to with the last two); WORK_POOL_TYPE, and ARCHIVAL_... and RETRIEVAL_...
WORK_POOL, WORK_POOL_LIMIT, BASE_JOB_TEMPLATE, as the options of these names say.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import anyio
import msgspec

from flows.configuration import Change, Item, changes
from flows.configuration_files import POOLS, read_wanted
from flows.configuration_server import apply, connect, read_found, wanted_automations
from mover.cli_errors import record_of
from mover.errors import ExitCode, MoverError

__all__ = ["configure", "main"]


async def configure(
    configs: Sequence[Path], environ: Mapping[str, str], *, check: bool = False, deadline_s: float = 120.0
) -> list[Item]:
    """Compares the server with the files and the environment and, unless ``check``, writes what differs.

    Returns:
        All items, in the order of writing.

    Raises:
        ConfigError: the configuration is wrong; nothing was written.
        PrefectServerError: the server does not answer within ``deadline_s``, or fails.
    """
    wanted = await anyio.to_thread.run_sync(read_wanted, configs, environ, wanted_automations())
    async with connect(deadline_s) as client:
        planned: Sequence[Change] = changes(wanted, await read_found(client, wanted))
        if not check:
            for change in planned:
                await apply(client, change)
    return [change.item for change in planned]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = _parser().parse_args(arguments)
    environ = {**os.environ, **_given(options)}
    try:
        items = anyio.run(_configure, options, environ)
    except MoverError as error:
        record = record_of(error)
        text = msgspec.json.encode({"error": record}).decode() if options.json else ""
        sys.stdout.write(f"{text}\n" if text else "")
        sys.stderr.write(f"{record.message}\n")
        return record.exit_code
    differs = any(item.state != "unchanged" for item in items)
    if options.json:
        document = {"check": options.check, "differs": differs, "items": items}
        sys.stdout.write(msgspec.json.encode(document).decode() + "\n")
    else:
        sys.stdout.write(_table(items, check=options.check))
    return int(ExitCode.SYSTEM if options.check and differs else ExitCode.DONE)


async def _configure(options: argparse.Namespace, environ: Mapping[str, str]) -> list[Item]:
    return await configure(options.config, environ, check=options.check, deadline_s=options.wait_s)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flows.configure", description="Configures the Prefect server.")
    add = parser.add_argument
    add("--config", type=Path, action="append", default=[], metavar="FILE", help="TOML file; a later one counts")
    add("--check", action="store_true", help="only compare; exit code 1 when something differs")
    add("--json", action="store_true", help="one JSON document on standard output")
    add("--wait-s", type=float, default=120.0, metavar="S", help="how long to wait for the server (120 s)")
    add("--pool-type", dest="WORK_POOL_TYPE", choices=("docker", "process"), help="type of the work pools (docker)")
    for pool in POOLS:
        option, key = pool.prefix.lower(), pool.prefix
        add(f"--{option}-pool", dest=f"{key}_WORK_POOL", metavar="NAME", help=f"work pool ({pool.name})")
        text = f"flow runs of it at a time ({pool.concurrency_limit})"
        add(f"--{option}-pool-limit", dest=f"{key}_WORK_POOL_LIMIT", metavar="N", help=text)
        text = "JSON file with its base job template (none: the worker's own)"
        add(f"--{option}-base-job-template", dest=f"{key}_BASE_JOB_TEMPLATE", metavar="FILE", help=text)
    return parser


def _given(options: argparse.Namespace) -> dict[str, str]:
    given = {name: value for name, value in vars(options).items() if name.isupper() and value is not None}
    return {name: str(Path(value).absolute()) if name.endswith("TEMPLATE") else value for name, value in given.items()}


def _table(items: Sequence[Item], *, check: bool) -> str:
    words = {"created": "missing", "updated": "differs"} if check else {}
    rows = [(item.kind, item.name, words.get(item.state, item.state), item.detail) for item in items]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    ]
    changed = sum(item.state != "unchanged" for item in items)
    summary = f"{changed} {'to change' if check else 'changed'}, {len(items) - changed} unchanged"
    return "".join(f"{line.rstrip()}\n" for line in [*lines, summary])


if __name__ == "__main__":
    sys.exit(main())
