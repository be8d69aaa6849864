"""A background thread changes nothing for the others."""

from __future__ import annotations

import os
import sys
import threading

import pytest
import torch

from lorafleet.shard.background import enter_background


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities on Linux only")
def test_only_the_calling_thread_yields() -> None:
    before = torch.get_num_threads()
    priority = os.getpriority(os.PRIO_PROCESS, 0)
    torch.set_num_threads(3)
    seen: list[int] = []

    def work() -> None:
        enter_background()
        own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        seen.extend((torch.get_num_threads(), own))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    try:
        assert seen == [1, max(priority, 10)]
        assert torch.get_num_threads() == 3
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == priority
    finally:
        torch.set_num_threads(before)
