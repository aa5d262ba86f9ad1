"""The allocator of the daemon's process, asked in one of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mover.daemon_memory import ARENAS

ASKED = """
import ctypes, sys, threading
from mover.daemon_memory import bound_arenas
assert sys.argv[2] == "as it is" or bound_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
libc.fopen.argtypes, libc.malloc_info.argtypes = [ctypes.c_char_p] * 2, [ctypes.c_int, ctypes.c_void_p]
libc.fclose.argtypes = [ctypes.c_void_p]
together = threading.Barrier(8)
def allocate():
    together.wait()
    libc.malloc(ctypes.c_size_t(5000))
    together.wait()
threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
file = libc.fopen(sys.argv[1].encode(), b"w")
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.parametrize("how", ["bounded", "as it is"])
def test_many_threads_share_few_arenas(tmp_path: Path, how: str) -> None:
    subprocess.run([sys.executable, "-c", ASKED, str(tmp_path / "info"), how], check=True, timeout=60)
    arenas = (tmp_path / "info").read_text().count("<heap nr=")
    assert (arenas <= ARENAS) == (how == "bounded"), arenas
