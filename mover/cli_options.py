"""Arguments and options that commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "Assignments",
    "ConfigFile",
    "DatasetId",
    "DatasetIds",
    "DryRun",
    "Files",
    "Form",
    "Json",
    "Level",
    "Members",
    "MoveRate",
    "Script",
    "Url",
    "Verbose",
    "VerifyRate",
    "Wait",
]


class Level(StrEnum):
    """How much ``verify`` proves."""

    WRITTEN = "written"
    READ_BACK = "read-back"
    RECALLED = "recalled"


class Form(StrEnum):
    """What ``retrieve`` puts into the bucket."""

    DATABLOCKS = "datablocks"
    FILES = "files"


DatasetIds = Annotated[list[str], typer.Argument(metavar="PID...", help="datasets, with the slash", show_default=False)]
DatasetId = Annotated[str, typer.Argument(metavar="PID", help="dataset, with the slash", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="say what would be done, write nothing")]
Wait = Annotated[float, typer.Option("--wait", metavar="SECONDS", min=0, help="wait for a dataset that is in use")]
Members = Annotated[bool, typer.Option("--members", help="list the files, too")]
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="TOML file with settings")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="a setting, e.g. MOVER_BUFFER_MB=64")
]
Url = Annotated[
    str,
    typer.Option("--url", metavar="URL", help="let this daemon do it: http://host:8420 or unix:/path; or MOVER_URL"),
]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="more about what happens; tracebacks")]
MoveRate = Annotated[float, typer.Option("--move-rate", metavar="MB/S", min=0.001, help="assumed rate")]
VerifyRate = Annotated[float, typer.Option("--verify-rate", metavar="MB/S", min=0.001, help="the same")]
Files = Annotated[list[str] | None, typer.Option("--file", metavar="PATH", help="this file alone; may be repeated")]
Script = Annotated[
    Path | None,
    typer.Option("--script", metavar="FILE", help="write a download script there, mode 0600"),
]
