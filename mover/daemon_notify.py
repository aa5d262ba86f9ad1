"""What a service manager is told and asks: systemd's notification socket, without its library.

Without ``NOTIFY_SOCKET`` in the environment, which means that nobody listens, everything here does nothing.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping

__all__ = ["Notifier"]

_log = logging.getLogger(__name__)


class Notifier:
    """Sends states to the service manager; may be used from any thread, and never fails."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        """``environ``: the process's own when None."""
        env = os.environ if environ is None else environ
        self._address = env.get("NOTIFY_SOCKET", "")
        for_us = env.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        microseconds = env.get("WATCHDOG_USEC", "") if for_us else ""
        self.watchdog_s = int(microseconds) / 1e6 if microseconds.isdecimal() and self._address else 0.0
        """Within how many seconds the manager wants each sign of life; 0: it wants none."""

    def ready(self, status: str) -> None:
        """The daemon answers; also after a reload."""
        self.send(f"READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        """The configuration is being read again."""
        self.send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str) -> None:
        """The end has begun."""
        self.send(f"STOPPING=1\nSTATUS={status}")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``."""
        self.send(f"STATUS={text}")

    def alive(self) -> None:
        """A sign of life."""
        self.send("WATCHDOG=1")

    def extend(self, seconds: float) -> None:
        """Start or stop takes so much longer."""
        self.send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def send(self, message: str) -> None:
        """Sends assignments, one a line."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(0)  # a manager that does not read must not stop the daemon
                sender.sendto(message.encode(), address)
        except OSError as error:
            _log.debug("the service manager was not told %r: %s", message, error)
