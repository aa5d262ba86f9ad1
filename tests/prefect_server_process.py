"""``prefect`` for a server on SQLite: a statement that fails is ended in its connection's own thread.

SQLAlchemy leaves the cursor of a statement that failed ("database is locked") to the garbage collector, which ends it
on the event loop's thread. That waits there for the connection, whose thread waits up to 60 s for a writer, who needs
the event loop. Flow processes that write at the same time would stop the server for a minute at a time.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from typing import Any

import aiosqlite.cursor

__all__: list[str] = []

_execute = aiosqlite.cursor.Cursor._execute  # noqa: SLF001 - there is no other way in


async def _ending(self: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as it is
    try:
        return await _execute(self, call, *args, **kwargs)  # type: ignore[no-untyped-call]
    except BaseException:
        self._conn._tx.put_nowait((None, self._cursor.close))  # noqa: SLF001 - the queue of the connection's thread
        raise


if __name__ == "__main__":
    aiosqlite.cursor.Cursor._execute = _ending  # type: ignore[method-assign, assignment] # noqa: SLF001
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)
