"""Connections of the daemon's HTTP server: a bounded number, and none that waits for a peer for ever."""

from __future__ import annotations

import asyncio
from typing import Final

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

__all__ = ["CONNECTIONS", "PATIENCE_S", "PatientProtocol"]

CONNECTIONS: Final = 1_000
"""Open at a time; more are closed at once. Descriptors are needed for the LTS, S3 and the journal, too."""

PATIENCE_S: Final = 60.0
"""For a whole request, and for a peer that takes nothing of an answer; it is let go within twice this time."""

_FIRST_REQUEST: Final = "first request"


class PatientProtocol(H11Protocol):
    """uvicorn's protocol waits without an end for a request and for its answer to be taken; this one does not.

    Between requests uvicorn's own time-out counts.
    """

    patience_s = PATIENCE_S
    _look: asyncio.TimerHandle | None = None
    _seen: object = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        """See asyncio.Protocol."""
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.abort()
        else:
            self._look = self.loop.call_later(self.patience_s, self._look_at_it)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)

    def _look_at_it(self) -> None:
        found = self._waits_for()
        if found in {_FIRST_REQUEST, self._seen} - {None}:
            self.transport.abort()
            return
        self._seen = found
        self._look = self.loop.call_later(self.patience_s, self._look_at_it)

    def _waits_for(self) -> object:
        """What it waits for from the peer, the same thing as long as it is the same; None: nothing."""
        if self.flow.write_paused:
            return ("taken", self.transport.get_write_buffer_size())
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None:
            return _FIRST_REQUEST
        if cycle.response_complete:
            return None if self.timeout_keep_alive_task is not None else ("next request", id(cycle))
        return ("body", id(cycle)) if cycle.more_body else None
