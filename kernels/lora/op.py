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
_MAX_BATCHED_ROWS = 8


class PaddedRows(NamedTuple):
    """The tokens of a batch's segments as a [num_segments, longest] grid."""

    tokens: slice | torch.Tensor  # cell by cell; a short segment repeats its first token
    kept: torch.Tensor | None  # int64, the cells that are not such a repetition; None = every cell
    owners: slice | torch.Tensor  # the token of each kept cell
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
        """The grid of the segments' tokens."""
        tokens: list[int] = []
        kept: list[int] = []
        owners: list[int] = []
        for index, (_, start, stop) in enumerate(self.segments):
            tokens += [*range(start, stop), *[start] * (self.longest - (stop - start))]
            kept += range(index * self.longest, index * self.longest + stop - start)
            owners += range(start, stop)
        return PaddedRows(
            self._index(tokens),
            None if len(kept) == len(tokens) else torch.tensor(kept, device=self.row_slots.device),
            self._index(owners),
            len(self.segments),
        )

    def _index(self, tokens: list[int]) -> slice | torch.Tensor:
        """A slice where the tokens are one run: reading and adding then need no index."""
        if tokens == list(range(tokens[0], tokens[-1] + 1)):
            return slice(tokens[0], tokens[-1] + 1)
        return torch.tensor(tokens, device=self.row_slots.device)


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
    grid = x[rows.tokens].view(rows.num_segments, -1, x.shape[1])
    h = torch.bmm(grid, stack.a.transpose(1, 2))
    for part in stack.parts:
        added = torch.bmm(h[:, :, part.h_start : part.h_stop], part.b).flatten(0, 1)
        if rows.kept is not None:
            added = added[rows.kept]
        columns = y[:, part.y_start : part.y_stop]
        if isinstance(rows.owners, slice):
            columns[rows.owners].add_(added)
        else:
            columns.index_add_(0, rows.owners, added)


def _add_by_segment_(y: torch.Tensor, x: torch.Tensor, site: SiteWeights, batch: LoraBatch) -> None:
    for slot, start, stop in batch.segments:
        weights = site.slot(slot)
        if weights is not None:
            h = x[start:stop] @ weights.a.T
            for part in weights.parts:
                y[start:stop, part.y_start : part.y_stop].addmm_(
                    h[:, part.h_start : part.h_stop], part.b
                )
