"""Threads that yield to the compute."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

import torch

_NICE = 10


def enter_background() -> None:
    """For the calling thread's life: lower priority (Linux), and operations on this thread alone.

    A second team of OpenMP threads would put the compute's to sleep between its operations.
    """
    torch.set_num_threads(1)  # of this thread, and of those that first use torch from now on
    if hasattr(os, "setpriority"):
        with suppress(OSError):  # elsewhere than on Linux a thread is no process
            own = threading.get_native_id()
            nice = max(_NICE, os.getpriority(os.PRIO_PROCESS, own))
            os.setpriority(os.PRIO_PROCESS, own, nice)
