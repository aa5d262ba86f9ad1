"""What goes wrong on request: finding the fault of a request, and acting it out."""

from __future__ import annotations

import asyncio
import re
from urllib.parse import unquote

from tests.scicat_fake.state import Fault, State

__all__ = ["fault_of", "wait_out"]

_POLL_S = 0.005


def fault_of(state: State, method: str, raw_path: str) -> Fault | None:
    """The first fault that the request meets; it is counted."""
    for fault in list(state.faults):
        if fault.method and fault.method.upper() != method:
            continue
        pattern = re.compile(fault.path, re.IGNORECASE)
        if not (pattern.search(raw_path) or pattern.search(unquote(raw_path))):
            continue
        if fault.after > 0:
            fault.after -= 1
            continue
        if fault.times >= 0 and fault.hits >= fault.times:
            continue
        fault.hits += 1
        return fault
    return None


async def wait_out(state: State, fault: Fault) -> None:
    """Waits for the fault's delay, and until it is removed when it holds requests."""
    if fault.delay_s:
        await asyncio.sleep(fault.delay_s)
    while fault.hold and any(fault is other for other in state.faults):  # noqa: ASYNC110 - another thread may remove it
        await asyncio.sleep(_POLL_S)
