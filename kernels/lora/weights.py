"""SiteWeights: every slot's adapter weights at one site, as the device and the host see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

_MAX_VIEWED_SLOTS = 64  # views are cheap to make again and too many to keep for every slot


class Part(NamedTuple):
    """One target's half of an adapter, and where its columns are in h and in y."""

    b: torch.Tensor  # [rank, out_local]
    h_start: int
    h_stop: int
    y_start: int
    y_stop: int


class SlotWeights(NamedTuple):
    """One adapter at one site: h = x @ a^T, then y[:, y_start:y_stop] += h[:, part] @ b."""

    a: torch.Tensor  # [sum of ranks, in_local]
    parts: tuple[Part, ...]


class Stack(NamedTuple):
    """The weights of several slots together, target by target and inside a target slot by slot.

    `owners` int32 [sum of ranks]: the slot that each row of `weights.a` belongs to.
    """

    slots: tuple[int, ...]
    rows: tuple[Sequence[int], ...]  # of the table when it was built; a new object makes it stale
    weights: SlotWeights
    owners: torch.Tensor


class SiteWeights:
    """The weights of one site.

    `arena`: 1-D tensor of the serving dtype that holds every adapter on the device.
    `table`: int64 [num_slots + 1, 8] on the device, a row per slot:
        [a_offset, rank_total, rank_0, b_offset_0, rank_1, b_offset_1, rank_2, b_offset_2],
        offsets in elements of the arena, in the order of the site's targets; all zero where a
        slot has no weights here.
    `rows`: the same rows on the host, kept up to date by their owner. A slot that is written again
        gets a new row object, even if it is equal to the old one, unless it is empty.
    """

    def __init__(
        self,
        arena: torch.Tensor,
        table: torch.Tensor,
        rows: Sequence[Sequence[int]],
        in_features: int,
        out_splits: Sequence[int],
    ) -> None:
        """`in_features` is x's width, `out_splits` the widths of y's parts, one per target."""
        assert arena.dim() == 1
        assert table.shape == (len(rows), 8)
        self.arena, self.table, self.rows = arena, table, rows
        self.in_features, self.out_splits = in_features, tuple(out_splits)
        self._stack: Stack | None = None
        self._views: dict[int, tuple[Sequence[int], SlotWeights]] = {}

    def slot(self, slot: int) -> SlotWeights | None:
        """Views of a slot's weights in the arena; None when it has none at this site."""
        row = self.rows[slot]
        if not row[1]:
            return None
        known = self._views.get(slot)
        if known is not None and known[0] is row:
            return known[1]
        if len(self._views) >= _MAX_VIEWED_SLOTS:
            self._views.clear()
        weights = self._view(row)
        self._views[slot] = row, weights
        return weights

    def stack(self, slots: tuple[int, ...]) -> Stack:
        """A copy of the slots' weights, of which at least one has some here.

        Only the last one is kept; it serves as long as the slots are the same and hold the same.
        """
        stack = self._stack
        if stack is None or stack.slots != slots or not self._is_current(stack):
            stack = self._stack = self._build_stack(slots)
        return stack

    def _is_current(self, stack: Stack) -> bool:
        pairs = zip(stack.slots, stack.rows, strict=True)
        return all(self.rows[slot] is row for slot, row in pairs)

    def _build_stack(self, slots: tuple[int, ...]) -> Stack:
        held = [(slot, weights) for slot in slots if (weights := self.slot(slot)) is not None]
        a: list[torch.Tensor] = []
        owners: list[int] = []
        parts: list[Part] = []
        for y_start in sorted({part.y_start for _, weights in held for part in weights.parts}):
            h_start, blocks = len(owners), []
            for slot, weights in held:
                for part in weights.parts:
                    if part.y_start == y_start:
                        a.append(weights.a[part.h_start : part.h_stop])
                        blocks.append(part.b)
                        owners += [slot] * part.b.shape[0]
            b = torch.cat(blocks)
            parts.append(Part(b, h_start, len(owners), y_start, y_start + b.shape[1]))
        owner = torch.tensor(owners, dtype=torch.int32, device=self.arena.device)
        rows = tuple(self.rows[slot] for slot in slots)
        return Stack(slots, rows, SlotWeights(torch.cat(a), tuple(parts)), owner)

    def _view(self, row: Sequence[int]) -> SlotWeights:
        parts, h_start, y_start = [], 0, 0
        for width, rank, offset in zip(self.out_splits, row[2::2], row[3::2], strict=False):
            if rank:
                b = self._block(offset, rank, width)
                parts.append(Part(b, h_start, h_start + rank, y_start, y_start + width))
            h_start, y_start = h_start + rank, y_start + width
        return SlotWeights(self._block(row[0], row[1], self.in_features), tuple(parts))

    def _block(self, offset: int, rows: int, columns: int) -> torch.Tensor:
        return self.arena[offset : offset + rows * columns].view(rows, columns)
