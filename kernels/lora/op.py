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
from functools import cached_property
from typing import NamedTuple, Self

import torch

from lorafleet.kernels.lora.weights import SiteWeights, SlotWeights

# Segments longer than this keep the device busy by themselves.
_MAX_BATCHED_ROWS = 16


class PaddedRows(NamedTuple):
    """The tokens of a batch's segments as a [num_segments, longest] grid."""

    tokens: slice | torch.Tensor  # cell by cell; a slice where they are one run without padding
    kept: torch.Tensor  # int64, the cells that are not padding
    owners: torch.Tensor  # int64, the token of each kept cell
    num_segments: int


@dataclass(frozen=True)
class LoraBatch:
    """Which token has which slot, on the device (`row_slots`) and on the host (`segments`).

    `row_slots`: int32 [num_tokens]. `segments`: (slot, start, stop) of every run of tokens with the
    same slot other than 0, in the order of the tokens.
    """

    row_slots: torch.Tensor
    segments: tuple[tuple[int, int, int], ...]

    @classmethod
    def none(cls, device: torch.device) -> Self:
        """A batch without adapters."""
        return cls(torch.empty(0, dtype=torch.int32, device=device), ())

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """The slot of each segment."""
        return tuple(slot for slot, _, _ in self.segments)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest segment."""
        return max(stop - start for _, start, stop in self.segments)

    @cached_property
    def is_batched(self) -> bool:
        """Whether one product over all segments beats one each: many, short, of similar length."""
        count, rows = len(self.segments), sum(stop - start for _, start, stop in self.segments)
        return count > 1 and self.longest <= _MAX_BATCHED_ROWS and count * self.longest <= 2 * rows

    @cached_property
    def padded(self) -> PaddedRows:
        """The grid of the segments' tokens; a short segment is padded with its first token."""
        cells: list[int] = []
        kept: list[int] = []
        owners: list[int] = []
        for _, start, stop in self.segments:
            kept += range(len(cells), len(cells) + stop - start)
            owners += range(start, stop)
            cells += [*range(start, stop), *[start] * (self.longest - (stop - start))]
        device, run = self.row_slots.device, slice(cells[0], cells[-1] + 1)
        is_run = cells == list(range(run.start, run.stop))
        return PaddedRows(
            run if is_run else torch.tensor(cells, device=device),
            torch.tensor(kept, device=device),
            torch.tensor(owners, device=device),
            len(self.segments),
        )


def lora_add_(y: torch.Tensor, x: torch.Tensor, site: SiteWeights, batch: LoraBatch) -> None:
    """See the module's docstring."""
    if not batch.segments:
        return
    assert x.shape[1] == site.in_features
    assert y.shape == (x.shape[0], sum(site.out_splits))
    stack = site.stack(batch.slots) if batch.is_batched else None
    if stack is None:
        _add_by_segment_(y, x, site, batch)
    else:
        _add_batched_(y, x, stack, batch.padded)


def _add_batched_(y: torch.Tensor, x: torch.Tensor, stack: SlotWeights, rows: PaddedRows) -> None:
    """Every segment at once; padded ranks are zeros and padded cells are left out of y."""
    grid = (rows.num_segments, -1)
    h = torch.bmm(x[rows.tokens].unflatten(0, grid), stack.a.transpose(1, 2))
    for part in stack.parts:
        part_h, part_y = h[:, :, part.h_start : part.h_stop], y[:, part.y_start : part.y_stop]
        if isinstance(rows.tokens, slice):
            # Not baddbmm_, which goes matrix by matrix where y's part is not contiguous.
            part_y[rows.tokens].add_(torch.bmm(part_h, part.b).flatten(0, 1))
        else:
            added = torch.bmm(part_h, part.b).flatten(0, 1)
            part_y.index_add_(0, rows.owners, added[rows.kept])


def _add_by_segment_(y: torch.Tensor, x: torch.Tensor, site: SiteWeights, batch: LoraBatch) -> None:
    for slot, start, stop in batch.segments:
        weights = site.slot(slot)
        if weights is not None:
            h = x[start:stop] @ weights.a.T
            for part in weights.parts:
                y[start:stop, part.y_start : part.y_stop].addmm_(
                    h[:, part.h_start : part.h_stop], part.b
                )
