"""The commands of the daemon: run it, and ask whether it is well."""

from __future__ import annotations

from typing import Annotated

import typer

from mover.cli_commands import app

__all__ = ["app", "health", "serve"]


@app.command()
def serve(context: typer.Context) -> None:
    """Run the daemon: jobs over HTTP, durable and shared fairly, on the host that mounts the LTS.

    SIGTERM stops it in order, SIGHUP reads limits and tokens again.
    """
    from mover.cli_daemon import run_daemon
    from mover.cli_run import Options

    raise typer.Exit(run_daemon(Options(*context.obj)))


@app.command()
def health(
    context: typer.Context,
    *,
    ready: Annotated[bool, typer.Option("--ready", help="whether everything that it needs works, too")] = False,
    timeout_s: Annotated[float, typer.Option("--timeout", metavar="SECONDS", min=0.1, help="for its answer")] = 5.0,
) -> None:
    """Ask a daemon whether it is alive: exit code 0 or 1. It is that of --url or MOVER_URL, or of this host."""
    from mover.cli_health import ask

    config, assignments, json, _, url = context.obj
    raise typer.Exit(ask(url, config, assignments, ready=ready, json=json, timeout_s=timeout_s))
