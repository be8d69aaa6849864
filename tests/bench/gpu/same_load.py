"""The engine alone under the load that the service gets over HTTP: what is lost on the way."""

from __future__ import annotations

import time

from tests.bench.gpu.closed_loop import ClosedLoop
from tests.bench.gpu.engine import Engine
from tests.bench.gpu.popularity import Request
from tests.bench.gpu.reports import Row
from tests.bench.gpu.shapes import Shape
from tests.bench.gpu.streams import Load

RANK = 16
_LOAD = Load()


def engine_alone(shape: Shape, load: Load = _LOAD, adapters: int = 32) -> list[Row]:
    """Tokens per second from the first plan on: base only, one adapter, and all of them."""
    tokens = load.prompt_tokens + load.output_tokens
    engine = Engine.build(
        shape, load.streams, tokens + 1, adapters, adapters * shape.packed_bytes(RANK)
    )
    engine.load_adapters([RANK] * adapters)
    loop = ClosedLoop(engine, load.streams, tokens)
    rows: list[Row] = []
    for what, slots in (
        ("base", [0]),
        (f"one shared r{RANK}", [1]),
        (f"{adapters} adapters r{RANK}", list(range(1, adapters + 1))),
    ):
        loop.run(_requests(load, slots, 1))  # warms up
        rows.append({"what": what, "streams": load.streams, **_rate(loop, load, slots)})
        print(f"{shape.name} engine alone {what:16} {rows[-1]['tokens_per_s']:8,.0f} tokens/s")
    return rows


def _rate(loop: ClosedLoop, load: Load, slots: list[int]) -> Row:
    started = time.perf_counter()
    steps = loop.run(_requests(load, slots, load.rounds))
    elapsed = steps[-1].finished_at - started
    return {"tokens_per_s": sum(step.new_tokens for step in steps) / elapsed, "steps": len(steps)}


def _requests(load: Load, slots: list[int], rounds: int) -> list[Request]:
    return [
        Request(slots[i % len(slots)], load.prompt_tokens, load.output_tokens)
        for i in range(rounds * load.streams)
    ]
