"""What each rank may use of this machine: cores, CUDA devices and malloc arenas, as environment."""

from __future__ import annotations

import ctypes
import os

_DEFAULTS = {
    # glibc's malloc: threads that come and go would spread what they free over 8 arenas a core.
    "MALLOC_ARENA_MAX": "2",
    # How often an OpenMP thread looks for its next work before it sleeps: 0.1 to 0.5 ms, more than
    # lies between a step's operations. By default it is milliseconds, and where another process
    # has driven two of a team onto one core, each waits out the other's time slice at every
    # operation; threads that sleep are woken on a core that is free.
    "GOMP_SPINCOUNT": "10000",
}


def rank_environments(num_shard: int, device: str) -> list[dict[str, str]]:
    """One environment per rank. `device` is ShardConfig's: auto, cpu or cuda.

    Raises ValueError when there are CUDA devices but fewer than ranks, or none where cuda is asked.
    """
    threads = str(max(1, len(usable_cores()) // num_shard))
    defaults = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **_DEFAULTS}
    environment = {name: os.environ.get(name, value) for name, value in defaults.items()}
    devices = [] if device == "cpu" else cuda_devices()
    if not devices and device != "cuda":
        return [dict(environment) for _ in range(num_shard)]
    if len(devices) < num_shard:
        raise ValueError(
            f"--num-shard {num_shard} needs as many CUDA devices and this machine offers "
            f"{len(devices)}; use fewer shards or --device cpu"
        )
    return [environment | {"CUDA_VISIBLE_DEVICES": name} for name in devices[:num_shard]]


def usable_cores() -> list[int]:
    """The cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cuda_devices() -> list[str]:
    """The visible CUDA devices as CUDA_VISIBLE_DEVICES names them; asks the driver, not torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if visible is None else [name for name in visible.split(",") if name.strip()]
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    return [str(i) for i in range(count.value)] if names is None else names[: count.value]
