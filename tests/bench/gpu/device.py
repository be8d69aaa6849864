"""The device that is measured: the CUDA one, or the CPU where a run only shows that it works."""

from __future__ import annotations

import gc
import platform
import time

import torch

from lorafleet.kernels import timing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_CUDA = DEVICE.type == "cuda"
_CPU_COPY_BYTES = 1 << 26


def name() -> str:
    """What reports call it."""
    return torch.cuda.get_device_name() if ON_CUDA else platform.processor() or "CPU"


def synchronize() -> None:
    """Waits for everything that is queued."""
    if ON_CUDA:
        torch.cuda.synchronize()


def give_back_memory() -> None:
    """Returns what nobody refers to, so that another process has the device to itself."""
    gc.collect()
    if ON_CUDA:
        torch.cuda.empty_cache()


def copy_bandwidth() -> float:
    """Bytes per second that a large copy reads and writes; floors count with it."""
    return timing.copy_bandwidth() if ON_CUDA else _cpu_copy_bandwidth()


def _cpu_copy_bandwidth() -> float:
    source = torch.ones(_CPU_COPY_BYTES // 4)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(seconds)
