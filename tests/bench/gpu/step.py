"""Decode and prefill steps of the engine alone, beside the byte floors of the same run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise

from tests.bench.gpu.device import copy_bandwidth
from tests.bench.gpu.engine import Engine
from tests.bench.gpu.shapes import SHAPES

CONTEXT = 512
BATCHES = (1, 8, 32, 64)
_STEPS = 48
_MAX_LEN = CONTEXT + 8 * _STEPS

Row = dict[str, object]


def decode(name: str) -> list[Row]:
    """Base only, B distinct adapters of rank 16 and 64, one shared, and mixed ranks."""
    bandwidth = copy_bandwidth()
    shape = SHAPES[name]
    engine = Engine.build(shape, max_rows=64, max_len=_MAX_LEN, num_slots=64,
                          arena_bytes=64 * shape.packed_bytes(64))  # fmt: skip
    rows: list[Row] = []
    for rank in (16, 64):
        slots = engine.load_adapters([rank] * 64)
        for batch in BATCHES:
            if rank == 16:
                rows.append(_measure(engine, "base", [0] * batch, 0, 0, bandwidth))
                shared = [slots[0]] * batch
                rows.append(_measure(engine, "one shared r16", shared, 1, 16, bandwidth))
            distinct = slots[:batch]
            rows.append(_measure(engine, f"distinct r{rank}", distinct, batch, rank, bandwidth))
        if rank == 16:
            halves = sorted(slots[:32] * 2)  # what 64 streams over 32 adapters come to
            rows.append(_measure(engine, "32 distinct r16", halves, 32, rank, bandwidth))
    rows += _rank_mix(engine, bandwidth)
    return rows


def _rank_mix(engine: Engine, bandwidth: float) -> list[Row]:
    """Half rank 8 and half rank 64 against all at their mean, 36 (E9)."""
    mixed = engine.load_adapters([8, 64] * 16)
    half = _measure(engine, "half r8 half r64", mixed, 32, 36, bandwidth)
    mean = engine.load_adapters([36] * 32)
    return [half, _measure(engine, "all r36", mean, 32, 36, bandwidth)]


def _measure(
    engine: Engine, what: str, slots: Sequence[int], adapters: int, rank: int, bandwidth: float
) -> Row:
    batch = len(slots)
    engine.prefill(slots, CONTEXT)
    step = engine.decode_ms(slots, CONTEXT, _STEPS)
    replay = engine.replay_ms()
    floor = engine.shape.floor_ms(batch, CONTEXT + _STEPS // 2, adapters, rank, bandwidth)
    row = {
        "model": engine.shape.name, "what": what, "batch": batch, "step_ms": step,
        "replay_ms": replay, "floor_ms": floor, "times_floor": step / floor,
        "tokens_per_s": 1e3 * batch / step,
    }  # fmt: skip
    print(
        f"{engine.shape.name} {what:18} B={batch:3} step {step:6.2f} ms  replay {replay:6.2f}  "
        f"floor {floor:5.2f}  x{step / floor:4.2f}",
        flush=True,
    )
    return row


def prefill(name: str, rounds: int = 30) -> list[Row]:
    """8 prompts of 512 tokens in one step: 8 distinct rank-16 adapters against base only.

    Medians; what is kept of the speed is the median over rounds, in which base only has a turn
    before the adapters and one after: the device's clock and the host move more from second to
    second than the two differ, and of a device that slows down the adapters would bear the cost.
    """
    shape = SHAPES[name]
    engine = Engine.build(shape, max_rows=8, max_len=1024, num_slots=8,
                          arena_bytes=8 * shape.packed_bytes(16))  # fmt: skip
    slots = engine.load_adapters([16] * 8)
    turns = [(engine.prefill([0] * 8, 512), engine.prefill(slots, 512)) for _ in range(rounds)][2:]
    bases, mixed = zip(*turns, strict=True)
    base, distinct = 1e3 * statistics.median(bases), 1e3 * statistics.median(mixed)
    around = zip(pairwise(bases), mixed[:-1], strict=True)
    kept = statistics.median((before + after) / 2 / turn for (before, after), turn in around)
    print(f"{name} prefill 8 x 512: base {base:.1f} ms, distinct r16 {distinct:.1f} ms, "
          f"kept {kept:.3f}", flush=True)  # fmt: skip
    return [
        {"model": name, "what": "prefill base", "ms": base, "of_base": 1.0},
        {"model": name, "what": "prefill distinct r16", "ms": distinct, "of_base": kept},
    ]
