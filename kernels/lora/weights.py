"""SiteWeights: every slot's adapter weights at one site, as the device and the host see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

_MAX_PADDING = 2  # ranks with padding over ranks without, in a stack
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
    """The weights of several slots side by side, each padded with zeros to the largest rank."""

    slots: tuple[int, ...]
    rows: tuple[Sequence[int], ...]  # of the table when it was built; a new object makes it stale
    weights: SlotWeights | None  # with a first axis for the slots; None where padding prevails


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
        self._stack_slots: tuple[int, ...] = ()
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

    def stack(self, slots: tuple[int, ...]) -> SlotWeights | None:
        """A copy of the slots' weights: a [len(slots), ranks, in_local], b [len(slots), rank, out].

        None where that is not worth it: their ranks differ too much, or these slots are asked for
        the first time in a row, so that they may not last. Only the last slots' copy is kept.
        """
        if slots != self._stack_slots:
            self._stack_slots, self._stack = slots, None
            return None
        if self._stack is None or not self._is_current(self._stack):
            rows = tuple(self.rows[slot] for slot in slots)
            self._stack = Stack(slots, rows, self._stacked(rows))
        return self._stack.weights

    def _is_current(self, stack: Stack) -> bool:
        pairs = zip(stack.slots, stack.rows, strict=True)
        return all(self.rows[slot] is row for slot, row in pairs)

    def _stacked(self, rows: tuple[Sequence[int], ...]) -> SlotWeights | None:
        ranks = [max(row[2 + 2 * i] for row in rows) for i in range(len(self.out_splits))]
        if len(rows) * sum(ranks) > _MAX_PADDING * sum(row[1] for row in rows):
            return None
        a = self.arena.new_zeros(len(rows), sum(ranks), self.in_features)
        parts, h_start, y_start = [], 0, 0
        for target, (rank, width) in enumerate(zip(ranks, self.out_splits, strict=True)):
            if rank:
                b = self.arena.new_zeros(len(rows), rank, width)
                self._fill(rows, target, a[:, h_start : h_start + rank], b)
                parts.append(Part(b, h_start, h_start + rank, y_start, y_start + width))
            h_start, y_start = h_start + rank, y_start + width
        return SlotWeights(a, tuple(parts)) if parts else None

    def _fill(
        self, rows: tuple[Sequence[int], ...], target: int, a: torch.Tensor, b: torch.Tensor
    ) -> None:
        """One target's A and B of every slot, into [num_slots, rank, ...]."""
        for index, row in enumerate(rows):
            rank, b_offset = row[2 + 2 * target], row[3 + 2 * target]
            a_offset = row[0] + sum(row[2 : 2 + 2 * target : 2]) * self.in_features
            if rank:
                a[index, :rank] = self._block(a_offset, rank, self.in_features)
                b[index, :rank] = self._block(b_offset, rank, b.shape[2])

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
