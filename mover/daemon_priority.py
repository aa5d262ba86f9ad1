"""Who goes first on a busy host: the loop and the journal, which callers wait for; then the threads that move bytes.

On two processors dozens of threads that copy and hash leave the loop to wait for its turn, again and again. Linux keeps
a niceness for each thread, so all but a few can give way. They lose nothing by it: the processors stay as busy.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

__all__ = ["NICENESS", "PROMPT", "give_way", "prompt_executor"]

NICENESS: Final = 10
"""Of threads that give way: about a tenth of the share of one that does not, where both want a processor."""

PROMPT: Final = "mover-prompt"
"""How names of threads begin that callers wait for."""

_TASKS: Final = Path("/proc/self/task")


def prompt_executor(name: str) -> ThreadPoolExecutor:
    """One thread that does not give way; start it from one that does not, either."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{PROMPT}-{name}")


def give_way(loop_thread_id: int) -> None:
    """Lowers the priority of this process's threads, but for the loop's (its native id), and those callers wait for.

    Threads inherit it from the one that starts them; those of libraries come and go, so it is called again and again.
    What cannot be set is left: it is about speed alone.
    """
    prompt = {thread.native_id for thread in threading.enumerate() if thread.name.startswith(PROMPT)}
    prompt |= {loop_thread_id, threading.get_native_id()}
    with suppress(OSError):  # no Linux
        for path in _TASKS.iterdir():
            thread_id = int(path.name)
            with suppress(OSError):  # it has ended, or somebody gave it another priority
                if thread_id not in prompt and os.getpriority(os.PRIO_PROCESS, thread_id) < NICENESS:
                    os.setpriority(os.PRIO_PROCESS, thread_id, NICENESS)
