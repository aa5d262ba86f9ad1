"""moto as the S3 storage of the demonstration, in a process of its own: the engine keeps a processor to itself.

Run as a program it serves on a free port of loopback, prints the port, and ends when its standard input does: it cannot
outlive the demonstration, however that ends.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec

import anyio
import anyio.to_thread

from mover.errors import MoverError, UsageError
from mover.streams.abandon import run_abandonable

__all__ = ["embedded_s3", "serve"]

_START_TIMEOUT_S = 30.0
_NO_MOTO = "the demonstration needs moto: install mover[demo]"


@asynccontextmanager
async def embedded_s3() -> AsyncIterator[str]:
    """URL of an S3 storage that holds its objects in memory and is gone after the block.

    Raises:
        UsageError: moto is not installed.
        MoverError: it does not start.
    """
    if find_spec("moto") is None:
        raise UsageError(_NO_MOTO)
    process = await anyio.to_thread.run_sync(_start)
    try:
        yield f"http://127.0.0.1:{await _port(process)}"
    finally:
        process.kill()
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(process.communicate)


def _start() -> subprocess.Popen[bytes]:
    # A session of its own: an interrupt from the keyboard must not take the storage away before the engine has stopped.
    return subprocess.Popen(
        [sys.executable, "-m", "mover.demo_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


async def _port(process: subprocess.Popen[bytes]) -> int:
    output, line = process.stdout, b""
    if output is not None:
        with suppress(TimeoutError):
            line = await run_abandonable(output.readline, _START_TIMEOUT_S)
    if not line.strip().isdigit():
        reason = "the embedded S3 storage does not start"
        raise MoverError(reason)
    return int(line)


def serve() -> None:
    """Serves until standard input ends."""
    from moto.server import ThreadedMotoServer

    logging.disable(logging.CRITICAL)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    serve()
