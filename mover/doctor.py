"""The preflight: tries what the mover relies on, one isolated check after another, and says what to do about it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum

import anyio
import msgspec

from mover.errors import MoverError
from mover.shown import masked, seconds_text

__all__ = ["Check", "CheckResult", "Finding", "Status", "fail", "fine", "run_checks", "skip", "warn"]


class Status(StrEnum):
    """What a check found; ``SKIP``: it could not be tried, because of another finding."""

    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"
    SKIP = "SKIP"


class Finding(msgspec.Struct, frozen=True):
    """What was measured, and what to do about it."""

    status: Status
    measured: str
    advice: str = ""


class Check(msgspec.Struct, frozen=True):
    """One thing to try; ``advice`` is given when it fails without saying why."""

    area: str
    name: str
    call: Callable[[], Awaitable[Finding]]
    advice: str = ""
    deadline_s: float = 30.0


class CheckResult(msgspec.Struct, frozen=True):
    """The outcome of one check, as ``--json`` tells it."""

    area: str
    name: str
    status: Status
    measured: str
    advice: str
    elapsed_s: float


def fine(measured: str) -> Finding:
    """All is well."""
    return Finding(Status.OK, measured)


def warn(measured: str, advice: str) -> Finding:
    """It works, with a drawback."""
    return Finding(Status.WARN, measured, advice)


def fail(measured: str, advice: str) -> Finding:
    """It does not work."""
    return Finding(Status.FAIL, measured, advice)


def skip(measured: str) -> Finding:
    """It could not be tried."""
    return Finding(Status.SKIP, measured)


async def run_checks(
    checks: Sequence[Check],
    *,
    secrets: tuple[str, ...] = (),
    on_result: Callable[[CheckResult], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> list[CheckResult]:
    """Runs all checks in order; a failure or a hang of one does not stop the others."""
    results = []
    for check in checks:
        began = clock()
        finding = await _attempt(check, secrets)
        result = CheckResult(
            check.area, check.name, finding.status, finding.measured, finding.advice, round(clock() - began, 3)
        )
        results.append(result)
        on_result(result)
    return results


async def _attempt(check: Check, secrets: tuple[str, ...]) -> Finding:
    try:
        with anyio.fail_after(check.deadline_s):
            return await check.call()
    except TimeoutError:
        return fail(f"no answer within {seconds_text(check.deadline_s)}", check.advice)
    except MoverError as error:
        return fail(masked(str(error), secrets), check.advice)
    except Exception as error:  # noqa: BLE001 - whatever a server or mount comes up with is a finding
        return fail(masked(f"{type(error).__name__}: {error}", secrets), check.advice)
