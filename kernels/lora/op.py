"""lora_add_: one site's LoRA update for a whole mixed batch.

Semantics:
    y[t, range_i] += (x[t] @ A_i^T) @ B_i        for every token t with slot s = row_slots[t] > 0
    and every target i of the site that s's adapter has; A_i is [rank_i, in_local], B_i is
    [rank_i, out_i] with the adapter's scale folded in, range_i is target i's part of y.
    The product x @ A^T is rounded to x's dtype. Rows of slot 0 keep their bits.

Arguments:
    y      [num_tokens, sum(out_splits)], serving dtype; written in place.
    x      [num_tokens, in_local], serving dtype; read.
    site   arena, table and rows of the site: SiteWeights.
    batch  which token has which slot: LoraBatch. No launch happens when it has no segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from lorafleet.kernels.lora.weights import SiteWeights, Stack

Segments = tuple[tuple[int, int, int], ...]

# Multiply-adds that cost as much as the launches one segment takes when it goes by itself.
_MACS_PER_SEGMENT = 400_000


@dataclass(frozen=True, slots=True)
class LoraBatch:
    """Which token has which slot, on the device (`row_slots`) and on the host (`segments`).

    `row_slots`: int32 [num_tokens]. `segments`: (slot, start, stop) of every run of tokens with the
    same slot other than 0, in the order of the tokens.
    """

    row_slots: torch.Tensor
    segments: Segments

    @classmethod
    def none(cls, device: torch.device) -> Self:
        """A batch without adapters."""
        return cls(torch.empty(0, dtype=torch.int32, device=device), ())


def lora_add_(y: torch.Tensor, x: torch.Tensor, site: SiteWeights, batch: LoraBatch) -> None:
    """See the module's docstring."""
    if not batch.segments:
        return
    assert x.shape[1] == site.in_features
    assert y.shape == (x.shape[0], sum(site.out_splits))
    slots = tuple(dict.fromkeys(slot for slot, _, _ in batch.segments))
    rank_total = sum(site.rows[slot][1] for slot in slots)
    if rank_total == 0:
        return
    if _stacking_pays(site, batch.segments, rank_total):
        start, stop = batch.segments[0][1], batch.segments[-1][2]
        row_slots = batch.row_slots[start:stop]
        _add_stacked_(y[start:stop], x[start:stop], site.stack(slots), row_slots)
    else:
        _add_by_segment_(y, x, site, batch.segments)


def _stacking_pays(site: SiteWeights, segments: Segments, rank_total: int) -> bool:
    """One product of everything with everything does more arithmetic in fewer launches."""
    if len(segments) < 2:
        return False
    num_rows = segments[-1][2] - segments[0][1]
    macs = num_rows * rank_total * (site.in_features + sum(site.out_splits))
    return macs <= len(segments) * _MACS_PER_SEGMENT


def _add_stacked_(y: torch.Tensor, x: torch.Tensor, stack: Stack, row_slots: torch.Tensor) -> None:
    """Gives each row its h under every adapter, and keeps those of the row's own adapter.

    The zeros that are left add nothing in the product with the stacked B. Filled, not multiplied:
    another adapter's h may overflow, and must not become this row's NaN.
    """
    h = x @ stack.weights.a.T
    h.masked_fill_(row_slots.unsqueeze(1) != stack.owners, 0)
    for part in stack.weights.parts:
        y[:, part.y_start : part.y_stop].addmm_(h[:, part.h_start : part.h_stop], part.b)


def _add_by_segment_(
    y: torch.Tensor, x: torch.Tensor, site: SiteWeights, segments: Segments
) -> None:
    for slot, start, stop in segments:
        weights = site.slot(slot)
        if weights is not None:
            h = x[start:stop] @ weights.a.T
            for part in weights.parts:
                y[start:stop, part.y_start : part.y_stop].addmm_(
                    h[:, part.h_start : part.h_stop], part.b
                )
