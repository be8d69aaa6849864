"""SiteWeights: every slot's adapter weights at one site, as the device and the host see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lorafleet.kernels.linear.op import prepack

_MAX_UNUSED = 4  # slots in a joined copy over slots in use
_MAX_ALONE = 64  # slots with a copy of their own


class Joined(NamedTuple):
    """Some slots' weights side by side, so that one product serves all their rows.

    y += h @ b^T with h = x @ a^T, set to zero in the columns that are not of the row's slot.
    `columns`: (slot, sum of ranks) of each run of h's columns.
    """

    a: torch.Tensor  # prepacked [sum of ranks, in_local]
    b: torch.Tensor  # prepacked [sum(out_splits), sum of ranks], zero outside a column's target
    columns: tuple[tuple[int, int], ...]
    slots: frozenset[int]
    rows: tuple[tuple[int, Sequence[int]], ...]  # of the table, by slot; a new object: stale


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
        # The CUDA kernels read 16 bytes at a time.
        self.has_kernels = (
            arena.is_cuda
            and arena.dtype in (torch.float16, torch.bfloat16)
            and all(width % 8 == 0 for width in (in_features, *self.out_splits))
        )
        self._asked: frozenset[int] = frozenset()
        self._joined: Joined | None = None
        self._alone: dict[int, Joined] = {}

    def alone(self, slot: int) -> Joined:
        """One slot's weights, in a copy that is kept while few slots are asked for."""
        known = self._alone.get(slot)
        if known is not None and _is_current(known, self.rows):
            return known
        if len(self._alone) >= _MAX_ALONE:
            self._alone.clear()
        self._alone[slot] = self._join(frozenset({slot}))
        return self._alone[slot]

    def joined(self, slots: frozenset[int]) -> Joined | None:
        """The weights of `slots` (without 0), and perhaps some more, side by side, in a copy.

        None when the last copy does not serve and these slots are asked for the first time in a
        row, so that they may not last. Only the last copy is kept.
        """
        if self._joined is not None and _serves(self._joined, slots, self.rows):
            return self._joined
        is_new, self._asked = slots != self._asked, slots
        if is_new:
            return None
        self._joined = self._join(slots)
        return self._joined

    def _join(self, slots: frozenset[int]) -> Joined:
        present = [slot for slot in sorted(slots) if self.rows[slot][1]]
        columns = tuple((slot, self.rows[slot][1]) for slot in present)
        rows = tuple((slot, self.rows[slot]) for slot in slots)
        if not present:
            return Joined(self.arena[:0], self.arena[:0], (), slots, rows)
        b = self.arena.new_zeros(sum(self.out_splits), sum(rank for _, rank in columns))
        start = 0
        for slot in present:
            start = self._fill_b(b, self.rows[slot], start)
        a = [
            self._block(self.rows[slot][0], self.rows[slot][1], self.in_features)
            for slot in present
        ]
        return Joined(prepack(torch.cat(a)), prepack(b), columns, slots, rows)

    def _fill_b(self, b: torch.Tensor, row: Sequence[int], start: int) -> int:
        """One slot's B, from column `start` on; returns the column behind it."""
        y_start = 0
        for width, rank, offset in zip(self.out_splits, row[2::2], row[3::2], strict=False):
            if rank:
                block = self._block(offset, rank, width)
                b[y_start : y_start + width, start : start + rank] = block.t()
            start, y_start = start + rank, y_start + width
        return start

    def _block(self, offset: int, rows: int, columns: int) -> torch.Tensor:
        return self.arena[offset : offset + rows * columns].view(rows, columns)


def _serves(joined: Joined, slots: frozenset[int], rows: Sequence[Sequence[int]]) -> bool:
    """Whether a copy is current and has these slots and not many others."""
    return (
        slots <= joined.slots
        and len(joined.slots) <= _MAX_UNUSED * len(slots)
        and _is_current(joined, rows)
    )


def _is_current(joined: Joined, rows: Sequence[Sequence[int]]) -> bool:
    return all(rows[slot] is row for slot, row in joined.rows)
