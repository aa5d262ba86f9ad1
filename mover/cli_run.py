"""Runs one command: settings in, work in an event loop, signals, a document or a few lines out, the exit code."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NoReturn, TypeVar

import anyio
import msgspec
from anyio.abc import TaskStatus

from mover.cli_errors import ErrorRecord, gravest, plain_error, record_of
from mover.errors import ConfigError, ExitCode, Fault, MoverError
from mover.settings import Settings, load_settings
from mover.settings_rules import Secret
from mover.shown import masked
from mover.tasks import open_task_group

if TYPE_CHECKING:
    from rich.console import Console

    from mover.progress import Display

__all__ = [
    "INTERRUPTED",
    "Options",
    "Outcome",
    "Results",
    "Session",
    "each_dataset",
    "execute",
    "parse_assignments",
    "print_usage_document",
    "report_error",
    "stdout_console",
]

T = TypeVar("T")

INTERRUPTED = "interrupted; the same command goes on from there"
_DATASETS_AT_A_TIME = 8
_SHOW_CURSOR = "\x1b[?25h"


class Options(msgspec.Struct, frozen=True):
    """The options that every command has. ``assignments`` are the ``NAME=VALUE`` of ``--set``.

    ``url`` is the daemon that is to do the work, '' for the one that MOVER_URL names, if any.
    """

    config: Path | None = None
    assignments: tuple[str, ...] = ()
    json: bool = False
    verbose: bool = False
    url: str = ""


class Outcome(msgspec.Struct, frozen=True):
    """What a command came to: a document for ``--json``, a way to show it, and by dataset what failed."""

    document: Mapping[str, object]
    show: Callable[[Console], None]
    failures: tuple[tuple[str, Exception], ...] = ()
    exit_code: ExitCode = ExitCode.DONE


class Session:
    """One command under way; ``settings`` are the effective ones, ``display`` is told the progress.

    ``on_interrupt``: what is said to somebody who interrupts it.
    """

    def __init__(self, options: Options, settings: Settings, display: Display) -> None:
        self.options, self.settings, self.display = options, settings, display
        self.interrupted = False
        self.on_interrupt = INTERRUPTED

    @property
    def remote(self) -> bool:
        """Whether a daemon does the work that it offers."""
        return bool(self.options.url or os.environ.get("MOVER_URL"))

    @property
    def daemon_url(self) -> str:
        """The daemon that was named, or the one of this host."""
        host = self.settings.mover_host
        here = f"http://{f'[{host}]' if ':' in host else host}:{self.settings.mover_port}"
        return self.options.url or os.environ.get("MOVER_URL") or here


class Results(Generic[T]):
    """What became of each dataset, in the order of the command line."""

    def __init__(self, dataset_ids: Sequence[str]) -> None:
        self._order = {dataset_id: index for index, dataset_id in enumerate(dict.fromkeys(dataset_ids))}
        self.done: dict[str, T] = {}
        self.failed: dict[str, Exception] = {}

    @property
    def dataset_ids(self) -> list[str]:
        """The datasets, each once."""
        return list(self._order)

    @property
    def reports(self) -> list[T]:
        """Of the datasets that are done."""
        return [self.done[dataset_id] for dataset_id in self._order if dataset_id in self.done]

    @property
    def failures(self) -> tuple[tuple[str, Exception], ...]:
        """Dataset and error of those that are not."""
        return tuple((dataset_id, self.failed[dataset_id]) for dataset_id in self._order if dataset_id in self.failed)


async def each_dataset(dataset_ids: Sequence[str], call: Callable[[str], Awaitable[T]]) -> Results[T]:
    """Calls for all datasets, several at a time; one that fails does not stop the others."""
    results: Results[T] = Results(dataset_ids)
    pending = iter(results.dataset_ids)

    async def work() -> None:
        for dataset_id in pending:  # shared: each task takes the next one
            try:
                results.done[dataset_id] = await call(dataset_id)
            except Exception as error:  # noqa: BLE001 - told at the end, with its exit code
                results.failed[dataset_id] = error

    async with open_task_group() as tasks:
        for _ in range(min(_DATASETS_AT_A_TIME, len(results.dataset_ids))):
            tasks.start_soon(work)
    return results


def execute(options: Options, work: Callable[[Session], Awaitable[Outcome]], *, quiet: bool = False) -> int:
    """Runs ``work`` and returns the exit code; nothing is raised. ``quiet``: no progress but on a terminal.

    SIGINT and SIGTERM cancel it, which leaves a state that the same command resumes; a second one ends the process.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the event loop watches
    logging.basicConfig(level=logging.INFO if options.verbose else logging.ERROR, stream=sys.stderr)
    logging.getLogger("mover").setLevel(logging.DEBUG if options.verbose else logging.WARNING)
    secrets: tuple[str, ...] = ()
    session: Session | None = None
    try:
        from mover.progress import open_display

        settings = load_settings(parse_assignments(options.assignments), config=options.config)
        secrets = _secrets(settings)
        session = Session(options, settings, open_display(quiet=(options.json or quiet) and not options.verbose))
        outcome = anyio.run(_supervise, session, work, backend_options={"use_uvloop": True})
        return _interrupted(options, session.on_interrupt) if outcome is None else _tell(options, outcome, secrets)
    except KeyboardInterrupt:
        return _interrupted(options, session.on_interrupt if session is not None else INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away: no second complaint
        return ExitCode.SYSTEM
    except Exception as error:  # noqa: BLE001 - the last stop: every failure becomes a line and an exit code
        if session is not None and session.interrupted:
            return _interrupted(options, session.on_interrupt)
        return report_error(options, error, secrets)
    finally:
        signal.signal(signal.SIGTERM, before)


async def _supervise(session: Session, work: Callable[[Session], Awaitable[Outcome]]) -> Outcome | None:
    """None when a signal ended it."""
    outcome: Outcome | None = None
    failure: Exception | None = None
    async with open_task_group() as tasks:
        with anyio.CancelScope() as scope:
            await tasks.start(_watch_signals, session, scope)
            try:
                with session.display:
                    outcome = await work(session)
            except Exception as error:  # noqa: BLE001 - kept whole: the task group would keep the first part of it
                failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return outcome


async def _watch_signals(
    session: Session, scope: anyio.CancelScope, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            if session.interrupted:
                _leave_at_once()
            session.interrupted = True
            session.display.note("interrupted: stopping in order; once more stops at once")
            scope.cancel()


def _leave_at_once() -> NoReturn:
    if sys.stderr.isatty():
        sys.stderr.write(_SHOW_CURSOR)
        sys.stderr.flush()
    os._exit(ExitCode.INTERRUPTED)


def parse_assignments(assignments: Sequence[str]) -> dict[str, object]:
    """Settings of ``--set``.

    Raises:
        ConfigError: not ``NAME=VALUE``, or a password, as every user of the host can see the arguments of a process.
    """
    options: dict[str, object] = {}
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator or not name:
            shown = assignment if re.fullmatch(r"[A-Z_]+", assignment) else Secret("")
            raise ConfigError("--set", shown, "NAME=VALUE")
        if name.upper().endswith("_PASSWORD"):
            allowed = f"given as {name}_FILE, in the environment or in a file; arguments are visible to everybody"
            raise ConfigError(name, Secret(""), allowed, "option")
        options[name] = value
    return options


def report_error(options: Options, error: BaseException, secrets: tuple[str, ...] = ()) -> int:
    """Tells an error that ended the command; returns its exit code."""
    record = record_of(error, secrets)
    _print_error(options, error, record, secrets)
    if options.json:
        _print_document({"error": record})
    return record.exit_code


def _tell(options: Options, outcome: Outcome, secrets: tuple[str, ...]) -> int:
    document, code = dict(outcome.document), int(outcome.exit_code)
    if outcome.failures:
        errors = [error for _, error in outcome.failures]
        worst = record_of(gravest(errors), secrets)
        failures = [{"dataset_id": item, "error": record_of(error, secrets)} for item, error in outcome.failures]
        document |= {"failures": failures, "error": worst}
        code = worst.exit_code
    if options.json:
        _print_document(document)
    else:
        outcome.show(stdout_console())
    for dataset_id, error in outcome.failures:
        _print_error(options, error, record_of(error, secrets), secrets, dataset_id)
    return code


def stdout_console() -> Console:
    """Where results go: never interprets what looks like markup, and does not fold tables in a pipe."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 200
    return Console(file=sys.stdout, width=width, markup=False, emoji=False, highlight=False)


def print_usage_document(message: str) -> None:
    """Tells a mistake in the arguments as ``--json`` does."""
    _print_document({"error": ErrorRecord("UsageError", message, ExitCode.USAGE, retryable=False, fault=Fault.USER)})


def _interrupted(options: Options, text: str) -> int:
    print(f"mover: {text}", file=sys.stderr)  # noqa: T201
    if options.json:
        _print_document(
            {"error": ErrorRecord("Interrupted", text, ExitCode.INTERRUPTED, retryable=True, fault=Fault.USER)}
        )
    return ExitCode.INTERRUPTED


def _print_document(document: dict[str, object]) -> None:
    data = msgspec.json.encode(document, enc_hook=str) + b"\n"
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.flush()


def _print_error(
    options: Options, error: BaseException, record: ErrorRecord, secrets: tuple[str, ...], dataset_id: str = ""
) -> None:
    leaf = plain_error(error)
    where = f"{dataset_id}: " if dataset_id and dataset_id not in record.message else ""
    hint = "" if isinstance(leaf, MoverError) or options.verbose else " (-v shows where)"
    lines = [f"mover: {where}{record.message}{hint}"]
    lines += [f"  {masked(note, secrets)}" for note in getattr(leaf, "__notes__", ())]
    if options.verbose:
        lines.append(masked("".join(traceback.format_exception(error)), secrets))
    print("\n".join(lines), file=sys.stderr)  # noqa: T201


def _secrets(settings: Settings) -> tuple[str, ...]:
    known = (settings.minio_password, settings.scicat_password)
    return tuple(secret.reveal() for secret in known if secret is not None)
