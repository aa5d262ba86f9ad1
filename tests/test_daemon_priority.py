"""Threads that move bytes give way; those that callers wait for do not. Real threads, real priorities."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

from mover.daemon_priority import NICENESS

_PROGRAM = """
import os, threading
from mover.daemon_priority import give_way, prompt_executor

def niceness(thread_id): return os.getpriority(os.PRIO_PROCESS, thread_id)

started, end = threading.Barrier(3), threading.Event()
def move(): started.wait(); end.wait()
movers = [threading.Thread(target=move) for _ in range(2)]
for mover in movers: mover.start()
started.wait()
with prompt_executor("journal") as executor:
    journal = executor.submit(threading.get_native_id).result()
    for _ in range(2): give_way(threading.get_native_id())
    print(niceness(threading.get_native_id()), niceness(journal), *(niceness(mover.native_id) for mover in movers))
    print(executor.submit(lambda: niceness(threading.get_native_id())).result())
end.set()
"""


def test_threads_give_way_but_for_the_loop_and_the_journal() -> None:
    # In a process of its own: what has given way cannot take it back.
    done = subprocess.run([sys.executable, "-c", _PROGRAM], check=True, capture_output=True, text=True)
    ours = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert done.stdout.split() == [str(nice) for nice in (ours, ours, max(ours, NICENESS), max(ours, NICENESS), ours)]
