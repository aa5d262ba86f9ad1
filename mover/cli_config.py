"""The command that shows the configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mover.cli_run import Outcome, Session
from mover.cli_tables import print_table
from mover.settings import s3_access, setting_rows

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["config"]


async def config(session: Session, *, check: bool) -> Outcome:
    """The effective settings, and with ``check`` whether they suffice.  Raises ConfigError."""
    if check:
        s3_access(session.settings)
    rows = list(setting_rows(session.settings))

    def show(console: Console) -> None:
        shown = [(row.name, row.value, row.origin, row.description) for row in rows]
        print_table(console, "", ("setting", "value", "origin", "meaning"), shown)
        if check:
            console.print("all required settings have values")

    return Outcome({"settings": [row._asdict() for row in rows]}, show)
