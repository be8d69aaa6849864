"""Timing on a CUDA device: events around replays, and the bandwidth that floors count with."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


def elapsed_ms(run: Callable[[], object], repeats: int, warm_up: int = 3) -> float:
    """Mean milliseconds of `run` over `repeats` back to back, by events."""
    for _ in range(warm_up):
        run()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / repeats


def graph_us(run: Callable[[], object], calls: int, repeats: int = 20) -> float:
    """Median microseconds of one of the `calls` launches that `run` makes, replayed as a graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = [elapsed_ms(graph.replay, 1, warm_up=1) for _ in range(repeats)]
    return 1e3 * statistics.median(times) / calls


def copy_bandwidth(gib: int = 4) -> float:
    """Bytes per second that a large device copy reads and writes; the best of five."""
    source = torch.empty(gib << 28, dtype=torch.int32, device="cuda").fill_(7)
    target = torch.empty_like(source)
    times = [elapsed_ms(lambda: target.copy_(source), 3) for _ in range(5)]
    return 2 * source.nbytes / (1e-3 * min(times))
