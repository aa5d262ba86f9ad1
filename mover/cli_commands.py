"""The commands. They parse; what they do stands in other modules, which are imported when they run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from mover import __version__
from mover.cli_options import (
    Assignments,
    ConfigFile,
    DatasetId,
    DatasetIds,
    DryRun,
    Files,
    Form,
    Json,
    Level,
    Members,
    MoveRate,
    Script,
    Url,
    Verbose,
    VerifyRate,
    Wait,
)

if TYPE_CHECKING:
    from mover.cli_run import Options, Outcome, Session

__all__ = [
    "app",
    "archive",
    "config",
    "demo",
    "doctor",
    "execute_command",
    "ls",
    "options",
    "plan",
    "repair",
    "retrieve",
    "verify",
]

app = typer.Typer(
    name="mover",
    help=(
        "Moves datasets from S3 to long-term storage and back, as verified tar datablocks."
        " The options below may stand anywhere on the line."
        " Exit codes: 0 done, 1 system error (try again), 2 usage or configuration, 3 user error,"
        " 4 integrity failure, 5 not enough space, 130 interrupted."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(given: bool) -> None:  # noqa: FBT001 - called by typer
    if given:
        typer.echo(f"mover {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    *,
    config: ConfigFile = None,
    assignments: Assignments = None,
    url: Url = "",
    json: Json = False,
    verbose: Verbose = False,
    version: Annotated[  # noqa: ARG001 - eager
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    """Takes the options that all commands have; the application's own help replaces this text."""
    context.obj = (config, tuple(assignments or ()), json, verbose, url)


def _options(context: typer.Context) -> Options:
    from mover.cli_run import Options

    return Options(*context.obj)


def execute_command(
    context: typer.Context, work: Callable[[Session], Awaitable[Outcome]], *, steps_only: bool = False
) -> NoReturn:
    """Runs the work of a command, and ends with its exit code."""
    from mover.cli_run import execute

    raise typer.Exit(execute(_options(context), work, quiet=steps_only))


@app.command()
def plan(
    context: typer.Context,
    *,
    dataset_ids: DatasetIds,
    members: Members = False,
    move_rate: MoveRate = 200.0,
    verify_rate: VerifyRate = 200.0,
) -> None:
    """Show what archiving would write: datablocks, exact bytes, space before and after, time."""

    async def work(session: Session) -> Outcome:
        from mover import cli_archive
        from mover.cli_estimate import Rates

        rates = Rates(move_bytes_per_s=move_rate * 1e6, verify_bytes_per_s=verify_rate * 1e6)
        return await cli_archive.plan(session, dataset_ids, rates, members=members)

    execute_command(context, work)


@app.command()
def archive(
    context: typer.Context,
    *,
    dataset_ids: DatasetIds,
    release_source: Annotated[
        bool, typer.Option("--release-source", help="delete the source objects after everything is proved")
    ] = False,
    wait: Wait = 0.0,
    dry_run: DryRun = False,
) -> None:
    """Plan, move, verify; the source stays unless asked. The same command again goes on where it stopped."""

    async def work(session: Session) -> Outcome:
        from mover import cli_archive
        from mover.cli_estimate import Rates

        if dry_run:
            return await cli_archive.plan(session, dataset_ids, Rates(), members=False)
        return await cli_archive.archive(session, dataset_ids, release_source=release_source, wait_s=wait)

    execute_command(context, work)


@app.command()
def verify(
    context: typer.Context,
    *,
    dataset_ids: DatasetIds,
    level: Annotated[
        Level, typer.Option("--level", help="written: sizes; read-back: every byte; recalled: every byte, from tape")
    ] = Level.READ_BACK,
    dry_run: DryRun = False,
) -> None:
    """Read the datablocks again and compare them with their manifests."""

    async def work(session: Session) -> Outcome:
        from mover import cli_archive

        return await cli_archive.verify(session, dataset_ids, level.value, dry_run=dry_run)

    execute_command(context, work)


@app.command()
def retrieve(
    context: typer.Context,
    *,
    dataset_id: DatasetId,
    files: Files = None,
    form: Annotated[Form, typer.Option("--as", help="whole datablocks, or their files as objects")] = Form.DATABLOCKS,
    script: Script = None,
    wait: Wait = 0.0,
    dry_run: DryRun = False,
) -> None:
    """Bring a dataset back to the retrieval bucket; prints links to download it."""

    async def work(session: Session) -> Outcome:
        from mover import cli_retrieve

        return await cli_retrieve.retrieve(
            session,
            dataset_id,
            files=tuple(files or ()),
            form=form.value,
            script=script,
            wait_s=wait,
            dry_run=dry_run,
        )

    execute_command(context, work)


@app.command()
def ls(
    context: typer.Context,
    *,
    dataset_id: Annotated[str | None, typer.Argument(metavar="[PID]", show_default=False)] = None,
    members: Members = False,
) -> None:
    """Show what is on the LTS, from the manifests."""

    async def work(session: Session) -> Outcome:
        from mover import cli_retrieve

        return await cli_retrieve.ls(session, dataset_id, members=members)

    if members and dataset_id is None:
        raise typer.BadParameter("--members needs a PID")  # noqa: TRY003 - said by typer, beside the usage
    execute_command(context, work)


@app.command()
def repair(
    context: typer.Context,
    *,
    dataset_id: DatasetId,
    datablock: Annotated[int, typer.Option("--datablock", metavar="N", min=1, help="its number", show_default=False)],
    wait: Wait = 0.0,
    dry_run: DryRun = False,
) -> None:
    """Rebuild one datablock from the landing zone or a retrieval copy."""

    async def work(session: Session) -> Outcome:
        from mover import cli_archive

        return await cli_archive.repair(session, dataset_id, datablock, wait_s=wait, dry_run=dry_run)

    execute_command(context, work)


@app.command()
def doctor(
    context: typer.Context,
    *,
    full: Annotated[bool, typer.Option("--full", help="also list more than 1,000 keys")] = False,
    speed_mb: Annotated[
        int, typer.Option("--speed-mb", metavar="MIB", min=8, max=1024, help="size of the file that measures the LTS")
    ] = 64,
) -> None:
    """Try what the mover relies on: S3 behaviour, LTS mount, scratch folder, limits."""

    async def work(session: Session) -> Outcome:
        from mover import cli_doctor

        return await cli_doctor.doctor(session, full=full, speed_mb=speed_mb)

    execute_command(context, work)


@app.command()
def config(
    context: typer.Context,
    *,
    check: Annotated[bool, typer.Option("--check", help="fail when a required setting is missing")] = False,
) -> None:
    """Show the effective settings and where each comes from; secrets are masked."""

    async def work(session: Session) -> Outcome:
        from mover import cli_config

        return await cli_config.config(session, check=check)

    execute_command(context, work)


@app.command()
def demo(
    context: typer.Context,
    *,
    folder: Annotated[Path | None, typer.Argument(metavar="[FOLDER]", show_default=False)] = None,
    keep: Annotated[bool, typer.Option("--keep/--clean", help="keep or remove what was written")] = True,
) -> None:
    """Archive, verify and retrieve FOLDER with everything embedded: S3 in memory, a folder as LTS."""

    async def work(session: Session) -> Outcome:
        from mover import cli_demo

        return await cli_demo.demo(session, folder, keep=keep)

    execute_command(context, work, steps_only=True)
