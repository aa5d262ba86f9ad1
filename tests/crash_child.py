"""Runs ``mover`` in processes to be killed: ``python -m tests.crash_child`` imports once and forks for every command.

It takes one JSON document a line, ``Start`` or ``Wait``, and answers each with a number: the process id, the exit code
(negative: the signal). A ``Point`` makes the process kill itself at a step of its real parts.
"""

from __future__ import annotations

import functools
import inspect
import os
import pkgutil
import signal
import sys
from collections.abc import Callable
from typing import Any, Literal, NoReturn

import msgspec

__all__ = ["Command", "Point", "Start", "Wait"]


class Point(msgspec.Struct, frozen=True):
    """A call of a real function at which the process dies, or sends itself a signal that it can handle.

    Attributes:
        owner: module or class, as in ``mover.streams.lts:LtsFolder``.
        name: the function in it.
        when: ``before`` or ``after`` the call, or ``half`` through: with the first half of its ``half_of`` argument.
        call: which call, from 1.
        about: counts only calls with an argument whose text ends so.
        half_of: position of the argument that is halved.
        signal: SIGKILL, if no other one.
    """

    owner: str
    name: str
    when: Literal["before", "after", "half"] = "before"
    call: int = 1
    about: str = ""
    half_of: int = 1
    signal: int = signal.SIGKILL


class Start(msgspec.Struct, frozen=True, tag="start"):
    """Runs ``mover`` with ``arguments`` and ``settings`` (environment); what it prints goes to the two files."""

    arguments: tuple[str, ...]
    settings: dict[str, str]
    stdout: str
    stderr: str
    point: Point | None = None


class Wait(msgspec.Struct, frozen=True, tag="wait"):
    """Waits for the end of a process."""

    pid: int


Command = Start | Wait


def arm(point: Point) -> None:
    """Wraps the function that ``point`` names."""
    owner = pkgutil.resolve_name(point.owner)
    setattr(owner, point.name, _deadly(getattr(owner, point.name), point))


def _deadly(real: Callable[..., Any], point: Point) -> Callable[..., Any]:
    calls = 0

    def due(arguments: tuple[Any, ...]) -> bool:
        nonlocal calls
        calls += any(str(argument).endswith(point.about) for argument in arguments) if point.about else 1
        return calls == point.call

    def halved(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        half = arguments[point.half_of]
        return (*arguments[: point.half_of], half[: len(half) // 2], *arguments[point.half_of + 1 :])

    if inspect.iscoroutinefunction(real):

        @functools.wraps(real)
        async def call_and_wait(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - anything is wrapped
            now = due(arguments)
            if now and point.when == "before":
                _send(point.signal)
            result = await real(*(halved(arguments) if now and point.when == "half" else arguments), **options)
            if now:
                _send(point.signal)
            return result

        return call_and_wait

    @functools.wraps(real)
    def call(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        now = due(arguments)
        if now and point.when == "before":
            _send(point.signal)
        result = real(*(halved(arguments) if now and point.when == "half" else arguments), **options)
        if now:
            _send(point.signal)
        return result

    return call


def _send(number: int) -> None:
    os.kill(os.getpid(), number)
    if number == signal.SIGKILL:
        signal.pause()  # it ends the process in a moment, which must not be spent on the next step


def _run(start: Start) -> NoReturn:
    for path, descriptor in ((os.devnull, 0), (start.stdout, 1), (start.stderr, 2)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.update(start.settings)
    if start.point is not None:
        arm(start.point)
    from mover.cli import main

    code = 70
    try:
        main(start.arguments)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    import mover.cli_archive
    import mover.progress  # noqa: F401 - what the command would import

    decoder = msgspec.json.Decoder(Command)
    while line := sys.stdin.buffer.readline():
        command = decoder.decode(line)
        if isinstance(command, Wait):
            _, status = os.waitpid(command.pid, 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if not answer:
                _run(command)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
