"""How long a call waits for another run to let go of its dataset."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import anyio

from mover.errors import DatasetBusyError

__all__ = ["while_busy"]

T = TypeVar("T")

_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 10.0


async def while_busy(
    call: Callable[[], Awaitable[T]],
    patience_s: float,
    on_wait: Callable[[str], None],
    *,
    sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    clock: Callable[[], float] = anyio.current_time,
) -> T:
    """Calls again while another run holds the dataset, for up to ``patience_s`` seconds.

    ``on_wait`` is told before each pause who holds it.

    Raises:
        DatasetBusyError: it was held all the time.
    """
    deadline, pause_s = clock() + patience_s, _FIRST_PAUSE_S
    while True:
        try:
            return await call()
        except DatasetBusyError as error:
            left_s = deadline - clock()
            if left_s <= 0:
                raise
            on_wait(f"in use by {error.holder}")
            await sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
