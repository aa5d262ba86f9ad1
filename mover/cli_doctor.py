"""The command of the preflight."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from mover.cli_run import Outcome, Session
from mover.cli_tables import print_table
from mover.doctor import CheckResult, Status, run_checks
from mover.doctor_catalogue import catalogue_checks
from mover.doctor_lts import LtsChecks
from mover.doctor_s3 import S3Checks
from mover.errors import ExitCode
from mover.shown import shown_name
from mover.wiring import engine_config, scicat_access

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["doctor"]


async def doctor(session: Session, *, full: bool, speed_mb: int) -> Outcome:
    """Runs all checks; the exit code is 1 when one failed.  Raises ConfigError."""
    config = engine_config(session.settings)
    secrets = (config.s3.secret_key,)
    async with AsyncExitStack() as stack:
        s3 = await stack.enter_async_context(S3Checks.open(config.s3, config.buckets, full=full))
        lts = LtsChecks(config, speed_bytes=speed_mb << 20)
        access = scicat_access(session.settings) if session.settings.scicat_endpoint else None
        checks = [*s3.checks(), *lts.checks(), *catalogue_checks(access)]
        results = await run_checks(checks, secrets=secrets)
    failed = any(result.status is Status.FAIL for result in results)
    counts = {str(status): sum(result.status is status for result in results) for status in Status}
    return Outcome(
        {"checks": results, "counts": counts},
        lambda console: _show(console, results, counts),
        exit_code=ExitCode.SYSTEM if failed else ExitCode.DONE,
    )


def _show(console: Console, results: list[CheckResult], counts: dict[str, int]) -> None:
    rows = [(item.status, item.area, shown_name(item.name), shown_name(item.measured)) for item in results]
    print_table(console, "", ("", "area", "check", "measured"), rows)
    for item in results:
        if item.advice and item.status is not Status.OK:
            console.print(f"{item.status} {item.area}, {shown_name(item.name)}: {item.advice}", soft_wrap=True)
    console.print(", ".join(f"{count} {status}" for status, count in counts.items() if count))
