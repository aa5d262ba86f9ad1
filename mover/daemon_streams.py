"""The events of a job for one reader: what is kept, how it stands, then live."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from functools import partial
from typing import Final

from mover.api import JobEvent, is_final
from mover.daemon_ledger import Ledger
from mover.daemon_store import Store
from mover.daemon_store_rows import read_job, read_transitions
from mover.daemon_store_schema import JobRow, TransitionRow
from mover.daemon_views import end_event, state_event

__all__ = ["all_events", "job_events"]

_PAGE: Final = 1_000  # changes that are read at a time


async def job_events(store: Store, ledger: Ledger, job_id: str, after: int) -> AsyncIterator[JobEvent]:
    """Events with numbers above ``after``; a reader who is too slow for what is held for it reads the journal again.

    Raises:
        UnknownJobError, JournalError: with the first event.
    """
    with ledger.hub.subscribed(job_id) as subscription:
        read_to, lost = 0, -1
        while True:
            while lost != subscription.lost:
                row, changes = await store.read(partial(_read, job_id=job_id, after=after))
                for change in changes:
                    yield state_event(change)
                    after = read_to = change.number
                if len(changes) < _PAGE:
                    lost = subscription.lost
                    if is_final(row.state):
                        if (end := end_event(row)).number > after:
                            yield end
                        return
                    _show_again(ledger, job_id)
            events = await subscription.take()
            if lost != subscription.lost:
                continue
            for event in _unread(events, read_to):
                yield event
                after = event.number
                if event.type == "end":
                    return


async def all_events(ledger: Ledger) -> AsyncIterator[JobEvent]:
    """Live events of all jobs; first how what is in work stands."""
    with ledger.hub.subscribed() as subscription:
        for job_id in list(ledger.jobs):
            _show_again(ledger, job_id)
        while True:
            for event in await subscription.take():
                yield event


def _unread(events: list[JobEvent], read_to: int) -> list[JobEvent]:
    """Without changes that were read from the journal before."""
    return [event for event in events if event.type != "state" or event.number > read_to]


def _read(connection: sqlite3.Connection, job_id: str, after: int) -> tuple[JobRow, list[TransitionRow]]:
    return read_job(connection, job_id), read_transitions(connection, job_id, after, _PAGE)


def _show_again(ledger: Ledger, job_id: str) -> None:
    """A new reader is told soon how the datasets in work stand."""
    job = ledger.jobs.get(job_id)
    for item in job.items.values() if job is not None else ():
        if item.live is not None:
            item.live.told = False
