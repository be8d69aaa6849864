"""Decoding under Punica's popularities (E1), and a fixed number of tokens over k adapters (E6)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace

from tests.bench.gpu.closed_loop import ClosedLoop, Step, seconds
from tests.bench.gpu.device import copy_bandwidth
from tests.bench.gpu.engine import Engine
from tests.bench.gpu.popularity import LAWS, Request, punica_requests
from tests.bench.gpu.reports import Row
from tests.bench.gpu.shapes import ALL_LINEAR, Shape

RANK = 16
_PROMPT_TOKENS, _OUTPUT_TOKENS = 64, 128  # of a request over k adapters
_TARGETS = {"q/v": ("q_proj", "v_proj"), "all-linear": ALL_LINEAR}


def popularity(
    shape: Shape,
    requests: int = 256,
    batches: tuple[int, ...] = (32, 64),
    max_tokens: int = 256,
) -> list[Row]:
    """Every adapter on the device, rank 16 all-linear; steps while all rows are busy count."""
    bandwidth = copy_bandwidth()
    engine = _engine(shape, max(batches), max_tokens, requests)
    engine.load_adapters([RANK] * requests)
    rows: list[Row] = []
    for batch in batches:
        loop = ClosedLoop(engine, batch, max_tokens)
        loop.run(punica_requests("distinct", requests, max_tokens), 4 * batch)  # warms up
        base: Row = {}
        for law in ("base", *LAWS):
            steps = loop.run(_asked(law, requests, max_tokens))
            row: Row = {"what": law, "batch": batch, **_busy(steps, batch, shape, bandwidth)}
            base = base or row
            row["retention"] = row["tokens_per_s"] / base["tokens_per_s"]
            row["step_retention"] = base["step_ms"] / row["step_ms"]
            rows.append(row)
            print(_popularity_line(shape, row), flush=True)
    return rows


def _asked(law: str, requests: int, max_tokens: int) -> list[Request]:
    """The requests of a law; of "base", the same without adapters."""
    if law != "base":
        return punica_requests(law, requests, max_tokens)
    asked = punica_requests("identical", requests, max_tokens)
    return [replace(request, adapter=0) for request in asked]


def _busy(steps: list[Step], batch: int, shape: Shape, bandwidth: float) -> Row:
    """Over the steps with every row busy: throughput, and its decode-only steps by the floor."""
    full = next(i for i, step in enumerate(steps) if step.rows == batch)
    steps = steps[full:]
    times = seconds(steps)
    decodes = [
        (time, step) for time, step in zip(times, steps[1:], strict=True) if not step.prompt_tokens
    ]
    floors = [
        shape.floor_ms(1, step.kv_tokens, step.adapters, RANK, bandwidth) for _, step in decodes
    ]
    step_ms = 1e3 * statistics.mean(time for time, _ in decodes)
    return {
        "tokens_per_s": sum(step.new_tokens for step in steps[1:]) / sum(times),
        "step_ms": step_ms,
        "floor_ms": statistics.mean(floors),
        "times_floor": step_ms / statistics.mean(floors),
        "distinct": statistics.mean(step.adapters for _, step in decodes),
        "steps": len(times),
        "decode_steps": len(decodes),
    }


def _popularity_line(shape: Shape, row: Row) -> str:
    return (
        f"{shape.name} {row['what']:9} B={row['batch']:3} {row['tokens_per_s']:8,.0f} tokens/s  "
        f"kept {row['retention']:4.2f}  {row['distinct']:4.1f} adapters a step  "
        f"step {row['step_ms']:6.2f} ms  floor {row['floor_ms']:5.2f}  x{row['times_floor']:4.2f}"
    )


def over_adapters(
    shape: Shape,
    new_tokens: int,
    batch: int = 128,
    adapter_counts: tuple[int, ...] = (1, 8, 32, 128),
) -> list[Row]:
    """Seconds to generate `new_tokens` in `batch` rows over k adapters of rank 16 (E6)."""
    most = max(adapter_counts)
    engine = _engine(shape, batch, _PROMPT_TOKENS + _OUTPUT_TOKENS, most)
    loop = ClosedLoop(engine, batch, _PROMPT_TOKENS + _OUTPUT_TOKENS)
    rows: list[Row] = []
    for name, targets in _TARGETS.items():
        engine.load_adapters([RANK] * most, targets=targets)
        loop.run(_round_robin(most), 4 * batch)  # warms up
        alone = 0.0
        for count in adapter_counts:
            steps = loop.run(_round_robin(count), new_tokens)
            tokens, wall = sum(step.new_tokens for step in steps[1:]), sum(seconds(steps))
            alone = alone or wall / tokens
            row: Row = {
                "what": name, "adapters": count, "batch": batch, "new_tokens": tokens,
                "seconds": wall, "tokens_per_s": tokens / wall, "ratio": wall / tokens / alone,
            }  # fmt: skip
            rows.append(row)
            print(
                f"{shape.name} {name:10} {count:3} adapters {tokens:8,} tokens in {wall:6.2f} s  "
                f"x{row['ratio']:4.2f} of one adapter",
                flush=True,
            )
    return rows


def _round_robin(adapters: int) -> Iterator[Request]:
    number = 0
    while True:
        yield Request(1 + number % adapters, _PROMPT_TOKENS, _OUTPUT_TOKENS)
        number += 1


def _engine(shape: Shape, rows: int, max_tokens: int, adapters: int) -> Engine:
    arena = adapters * shape.packed_bytes(RANK)
    return Engine.build(shape, rows, max_tokens, adapters, arena)
