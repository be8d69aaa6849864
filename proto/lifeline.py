"""A child's tie to its launcher: when the launcher is gone, however it ended, the child learns it.

The launcher keeps the write end of each child's standard input and never writes to it; the kernel
closes it with the launcher, SIGKILL included. `LORAFLEET_PARENT_PIPE=1` says that standard input is
such a pipe; started by hand, a shard or a router lives on its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import Thread

PARENT_PIPE = "LORAFLEET_PARENT_PIPE"
STDIN = 0


def watch_parent(on_eof: Callable[[], None]) -> None:
    """Calls `on_eof` once, on a thread of its own, when the launcher is gone.

    Returns at once; does nothing in a process that no launcher started.
    """
    if os.environ.get(PARENT_PIPE) == "1":
        Thread(target=_wait, args=(on_eof,), name="lifeline", daemon=True).start()


def _wait(on_eof: Callable[[], None]) -> None:
    # os.read, not sys.stdin.read: a daemon thread inside a buffered read aborts interpreter exit.
    while os.read(STDIN, 4096):
        pass
    on_eof()
