"""The command line's entry: arguments in, exit code out. ``mover --help`` imports nothing heavy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import typer

from mover.cli_jobs_commands import app

__all__ = ["hoisted", "main"]

_USAGE_ERROR: type[Any] = typer.BadParameter.__mro__[1]  # what every mistake in arguments derives from
_FLAGS = frozenset({"--json", "--verbose", "-v"})
_VALUED = frozenset({"--config", "--set", "--url"})


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs ``mover`` with the arguments of the process and ends it with the exit code."""
    given = hoisted(sys.argv[1:] if arguments is None else list(arguments))
    try:
        code = app(given, prog_name="mover", standalone_mode=False)
    except _USAGE_ERROR as error:
        error.show()
        if "--json" in given:
            _tell_usage(error.format_message())
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def hoisted(arguments: Sequence[str]) -> list[str]:
    """``arguments`` with the options of all commands in front of the command, wherever they stood."""
    front: list[str] = []
    rest: list[str] = []
    items = iter(arguments)
    for item in items:
        if item == "--":
            rest += [item, *items]
        elif item in _FLAGS or (item.partition("=")[0] in _VALUED and "=" in item):
            front.append(item)
        elif item in _VALUED:
            front += [item, *[value for value in [next(items, None)] if value is not None]]
        else:
            rest.append(item)
    return front + rest


def _tell_usage(message: str) -> None:
    from mover.cli_run import print_usage_document

    print_usage_document(message)


if __name__ == "__main__":
    main()
