"""The commands that ask the daemon for its jobs and limits, and change them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mover.cli_commands import execute_command
from mover.cli_serve import app

if TYPE_CHECKING:
    from mover.cli_run import Outcome, Session

__all__ = ["app", "jobs", "limits"]

_Words = Annotated[
    list[str] | None, typer.Argument(metavar="[ID | cancel ID]", help="a job, or to end one", show_default=False)
]
_Changes = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME=N]...", help="new numbers of slots", show_default=False)
]


@app.command()
def jobs(
    context: typer.Context,
    *,
    words: _Words = None,
    state: Annotated[str, typer.Option("--state", metavar="STATE", help="list those in this state")] = "",
    owner: Annotated[str, typer.Option("--owner", metavar="NAME", help="list those on this account")] = "",
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="list so many, newest first")] = 50,
    follow: Annotated[bool, typer.Option("--follow", help="follow the job to its end")] = False,
) -> None:
    """List the daemon's jobs, show one, or cancel one. The daemon is that of --url, MOVER_URL, or of this host."""

    async def work(session: Session) -> Outcome:
        from mover import cli_jobs

        return await cli_jobs.jobs(session, words or (), state=state, owner=owner, limit=limit, follow=follow)

    execute_command(context, work)


@app.command()
def limits(context: typer.Context, *, changes: _Changes = None) -> None:
    """Show the daemon's limits, or change them until its next start: `mover limits MOVE_TO_LTS_LIMIT=3`."""

    async def work(session: Session) -> Outcome:
        from mover import cli_jobs

        return await cli_jobs.limits(session, changes or ())

    execute_command(context, work)
