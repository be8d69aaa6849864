"""The LoRA kernels beside the bytes that they must read, graph replay, cold L2 (E13)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from lorafleet.kernels import timing
from lorafleet.kernels.linear import cuda as stream
from lorafleet.kernels.lora.op import LoraBatch, lora_add_
from lorafleet.kernels.lora.weights import SiteWeights

DTYPE = torch.bfloat16
_SITES = {  # of Llama-3.1-8B: in, outs
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
_COPIES = 4  # of every site: between two readings lies more than the L2 holds


@dataclass(frozen=True)
class _Case:
    weights: SiteWeights
    x: torch.Tensor
    y: torch.Tensor
    batch: LoraBatch


def lora() -> list[dict[str, object]]:
    """Microseconds a site call: shrink and expand alone, one behind the other."""
    bandwidth = timing.copy_bandwidth()
    rows: list[dict[str, object]] = []
    for rank in (16, 64):
        for popularity in ("distinct", "identical"):
            for batch in (1, 8, 32, 64):
                row = _measure(rank, popularity, batch, bandwidth)
                print(
                    {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()},
                    flush=True,
                )
                rows.append(row)
    return rows


def linears() -> list[dict[str, object]]:
    """The base model's products alone, microseconds and share of the copy bandwidth."""
    bandwidth = timing.copy_bandwidth()
    rows: list[dict[str, object]] = []
    for name, (wide, outs) in (_SITES | {"head": (4096, (128256,))}).items():
        weights = [torch.randn(sum(outs), wide, device="cuda", dtype=DTYPE) for _ in range(3)]
        for batch in (1, 8, 32, 64):
            x = torch.randn(batch, wide, device="cuda", dtype=DTYPE)
            rows += [row | {"what": name} for row in _products(x, weights, bandwidth)]
            for row in rows[-2:]:
                print(row, flush=True)
    return rows


def _products(
    x: torch.Tensor, weights: list[torch.Tensor], bandwidth: float
) -> list[dict[str, object]]:
    ways: dict[str, Callable[..., torch.Tensor]] = {"cublas": F.linear}
    if stream.supports(x, weights[0]):
        ways["stream"] = stream.linear
    rows: list[dict[str, object]] = []
    for way, multiply in ways.items():
        run = partial(_multiply_all, multiply, x, weights)
        us = timing.graph_us(run, len(weights))
        share = weights[0].nbytes / (us * 1e-6) / bandwidth
        rows.append({"way": way, "batch": len(x), "us": us, "share": share})
    return rows


def _multiply_all(
    multiply: Callable[..., torch.Tensor], x: torch.Tensor, weights: list[torch.Tensor]
) -> None:
    for weight in weights:
        multiply(x, weight, None)


def _measure(rank: int, popularity: str, batch: int, bandwidth: float) -> dict[str, object]:
    slots = list(range(1, batch + 1)) if popularity == "distinct" else [1] * batch
    row: dict[str, object] = {"rank": rank, "popularity": popularity, "batch": batch}
    total, floor = 0.0, 0.0
    for name, (wide, outs) in _SITES.items():
        cases = [_case(wide, outs, rank, slots) for _ in range(_COPIES)]
        us = timing.graph_us(partial(_run_all, cases), _COPIES)
        row[f"{name}_us"] = us
        total += us
        floor += len(set(slots)) * 2 * rank * (len(outs) * wide + sum(outs)) / bandwidth * 1e6
    return row | {"sum_us": total, "floor_us": floor, "times_floor": total / floor}


def _case(wide: int, outs: tuple[int, ...], rank: int, slots: list[int]) -> _Case:
    rows: list[tuple[int, ...]] = [(0,) * 8]
    cursor = 0
    for _ in range(max(slots)):
        row = [cursor, rank * len(outs)]
        cursor += rank * len(outs) * wide
        for out in outs:
            row += [rank, cursor]
            cursor += rank * out
        rows.append(tuple((row + [0] * 8)[:8]))
    arena = torch.randn(cursor, device="cuda", dtype=DTYPE)
    table = torch.tensor(rows, device="cuda")
    row_slots = torch.tensor(slots, dtype=torch.int32, device="cuda")
    return _Case(
        SiteWeights(arena, table, rows, wide, outs),
        torch.randn(len(slots), wide, device="cuda", dtype=DTYPE),
        torch.randn(len(slots), sum(outs), device="cuda", dtype=DTYPE),
        LoraBatch.captured(row_slots, rank),
    )


def _run_all(cases: list[_Case]) -> None:
    for case in cases:
        lora_add_(case.y, case.x, case.weights, case.batch)
