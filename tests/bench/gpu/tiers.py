"""Adapters on the move and adapters by the thousand, beside running decode steps."""

from __future__ import annotations

import statistics
import time
from collections import deque
from itertools import pairwise

import torch

from lorafleet.shard.worker import Launched
from tests.bench.gpu.device import give_back_memory
from tests.bench.gpu.engine import Engine
from tests.bench.gpu.shapes import SHAPES

CONTEXT = 512
_ROWS = 32
_STEPS = 96
_MOVE_EVERY = 8

Row = dict[str, object]


def transfers(name: str) -> list[Row]:
    """A rank-16 adapter from host memory every 8 steps, while 32 base rows decode (E12)."""
    engine = Engine.build(
        SHAPES[name], max_rows=_ROWS, max_len=CONTEXT + 3 * _STEPS, num_slots=16,
        arena_bytes=17 * SHAPES[name].packed_bytes(16),
    )  # fmt: skip
    engine.packed(16)
    engine.prefill([0] * _ROWS, CONTEXT)
    _stream(engine, CONTEXT, _STEPS, moves=False)
    quiet, _ = _stream(engine, CONTEXT, _STEPS, moves=False)
    busy, delays = _stream(engine, CONTEXT, _STEPS, moves=True)
    row: Row = {
        "model": name, "quiet_ms": statistics.median(quiet), "busy_ms": statistics.median(busy),
        "quiet_mean_ms": statistics.mean(quiet), "busy_mean_ms": statistics.mean(busy),
        "busy_over_quiet": statistics.mean(busy) / statistics.mean(quiet),
        "steps_until_ready": max(delays), "megabytes": engine.packed(16).nbytes / 1e6,
    }  # fmt: skip
    print(row, flush=True)
    return [row]


def _stream(
    engine: Engine, context: int, steps: int, *, moves: bool
) -> tuple[list[float], list[int]]:
    """Milliseconds between results, and for each move the steps until its slot was ready."""
    engine.prefill([0] * _ROWS, context)
    launched: deque[Launched] = deque()
    times: list[float] = []
    begun: dict[int, int] = {}
    delays: list[int] = []
    for number in range(steps):
        if moves and number % _MOVE_EVERY == 0 and number < steps - _MOVE_EVERY:
            slot = 1 + number // _MOVE_EVERY % 16
            with torch.inference_mode():
                engine.tier.begin_move(engine.packed(16), slot, slot * engine.packed(16).nbytes)
            begun[slot] = number
        launched.append(engine.launch(engine.decode_plan([0] * _ROWS, context + number)))
        if len(launched) > 1:
            result = engine.worker.finish(launched.popleft())
            times.append(time.perf_counter())
            delays += [number - 1 - begun[slot] for slot in result.ready_slots]
    engine.worker.finish(launched.popleft())
    gaps = [1e3 * (b - a) for a, b in pairwise(times[8:])]
    return gaps, delays


def capacity(name: str) -> list[Row]:
    """2,000 rank-8 all-linear adapters on the device against 5, five of them in use (E14)."""
    rows: list[Row] = []
    for count in (5, 2000):
        engine = Engine.build(
            SHAPES[name], max_rows=_ROWS, max_len=1024, num_slots=count,
            arena_bytes=count * SHAPES[name].packed_bytes(8),
        )  # fmt: skip
        slots = engine.load_adapters([8] * count)
        picked = [slots[i * count // 5] for i in range(5)]
        used = sorted(picked[i % 5] for i in range(_ROWS))
        engine.prefill(used, CONTEXT)
        step = engine.decode_ms(used, CONTEXT, 48)
        rows.append({"model": name, "registered": count, "step_ms": step})
        print(rows[-1], flush=True)
        del engine
        give_back_memory()
    return rows
