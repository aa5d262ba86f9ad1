"""The commands of the way back: retrieve, ls."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import anyio.to_thread

from mover import cli_remote
from mover.cli_archive import open_engine, patiently
from mover.cli_outcomes import retrieved
from mover.cli_run import Outcome, Session
from mover.cli_tables import print_listing
from mover.errors import UnknownFileError, UsageError
from mover.model import ManifestMember
from mover.reports import DatasetListing, RetrieveReport
from mover.retrieve_copy import Selection
from mover.shown import bytes_text, shown_name
from mover.streams.durable import commit_file

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["ls", "retrieve", "write_secret"]

_Form = Literal["datablocks", "files"]


async def retrieve(
    session: Session,
    dataset_id: str,
    *,
    files: Sequence[str],
    form: _Form,
    script: Path | None,
    wait_s: float,
    dry_run: bool,
) -> Outcome:
    """Brings a dataset back; its links are the result."""
    if session.remote:
        if dry_run:
            cli_remote.refuse_here("--dry-run of retrieve")
        report = await cli_remote.retrieve(session, dataset_id, files=files, form=form)
        return await _with_script(report, script)
    async with open_engine(session) as engine:
        if dry_run:
            selection = Selection(files)
            found = [item async for item in engine.members(dataset_id) if not files or selection.takes(item[1].path)]
            if selection.unknown:
                raise UnknownFileError(dataset_id, selection.unknown)
            return _would_retrieve(dataset_id, files, found, form)
        report = await patiently(
            session, dataset_id, wait_s, lambda: engine.retrieve(dataset_id, files=files, form=form)
        )
    return await _with_script(report, script)


async def _with_script(report: RetrieveReport, script: Path | None) -> Outcome:
    if script is not None:
        await anyio.to_thread.run_sync(write_secret, script, report.script.encode())
    return retrieved(report, script)


def _would_retrieve(
    dataset_id: str, files: Sequence[str], found: list[tuple[int, ManifestMember]], form: _Form
) -> Outcome:
    payload_bytes = sum(member.size_bytes for _, member in found)
    numbers = sorted({number for number, _ in found})
    what = f"{len(numbers):,} datablock(s)" if form == "datablocks" and not files else f"{len(found):,} file(s)"

    def show(console: Console) -> None:
        amount = bytes_text(payload_bytes)
        console.print(f"{what} with {amount} would go to the retrieval bucket; nothing was done (--dry-run)")

    document = {"dry_run": True, "dataset_id": dataset_id, "datablocks": numbers, "files": len(found)}
    return Outcome(document | {"payload_bytes": payload_bytes}, show)


def write_secret(path: Path, content: bytes) -> None:
    """Writes a file that its owner alone may read, whole or not at all. Blocking.

    Raises:
        UsageError: it cannot be written there.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            commit_file(fd, temporary, path, len(content), replace=True)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        reason = f"--script {path}: {error.strerror or error}"
        raise UsageError(reason) from error


async def ls(session: Session, dataset_id: str | None, *, members: bool) -> Outcome:
    """What is on the LTS."""
    if session.options.url:
        cli_remote.refuse_here("ls")
    async with open_engine(session) as engine:
        if dataset_id is not None and members:
            found = [item async for item in engine.members(dataset_id)]
            return _members(dataset_id, found)
        listings = [item async for item in engine.datasets(dataset_id)]
    return _listings(listings)


def _listings(listings: list[DatasetListing]) -> Outcome:
    return Outcome({"datasets": listings}, lambda console: print_listing(console, listings))


def _members(dataset_id: str, found: list[tuple[int, ManifestMember]]) -> Outcome:
    def show(_: Console) -> None:
        for number, member in found:
            sys.stdout.write(f"{number}\t{member.size_bytes}\t{shown_name(member.path)}\n")

    members = [
        {
            "datablock": number,
            "path": member.path,
            "size_bytes": member.size_bytes,
            "mtime_s": member.mtime_s,
            "offset_bytes": member.offset_bytes,
            "header_bytes": member.header_bytes,
            "windows": member.windows,
        }
        for number, member in found
    ]
    return Outcome({"dataset_id": dataset_id, "members": members}, show)
