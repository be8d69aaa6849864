"""SiteWeights: every slot's adapter weights at one site, as the device and the host see them."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_int, c_int64, c_void_p
from functools import cached_property
from typing import NamedTuple

import torch

from lorafleet.kernels.linear.op import prepack

_MAX_PADDING = 2  # ranks with padding over ranks without, in a stack
_MAX_ALONE = 64  # slots with a copy of their own


class Alone(NamedTuple):
    """One slot's weights in a copy: y += (x @ a^T) @ b^T. None where it has none at this site."""

    a: torch.Tensor | None  # prepacked [sum of ranks, in_local]
    b: torch.Tensor | None  # prepacked [sum(out_splits), sum of ranks], zero outside a target
    row: Sequence[int]  # of the table when it was built; a new object makes it stale


class Stack(NamedTuple):
    """Several slots' weights in a copy, each padded with zeros to the largest sum of ranks."""

    a: torch.Tensor  # [num_slots, ranks, in_local]
    b: torch.Tensor  # [num_slots, ranks, sum(out_splits)], zero outside a rank's target
    slots: tuple[int, ...]
    rows: tuple[Sequence[int], ...]


class SiteArguments(Structure):
    """`Site` of site.cuh."""

    _fields_ = (
        ("arena", c_void_p),
        ("table", c_void_p),
        ("stride", c_int64),
        ("in_features", c_int),
        ("outs", c_int * 3),
    )


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
        self._asked: tuple[int, ...] = ()
        self._stack: Stack | None = None
        self._alone: dict[int, Alone] = {}

    @cached_property
    def arguments(self) -> SiteArguments:
        """The site as the CUDA kernels are told of it; arena and table keep their addresses."""
        outs = (*self.out_splits, 0, 0)[:3]
        return SiteArguments(
            self.arena.data_ptr(), self.table.data_ptr(), self.table.stride(0), self.in_features,
            outs,
        )  # fmt: skip

    def alone(self, slot: int) -> Alone:
        """One slot's weights, in a copy that is kept while few slots are asked for."""
        known = self._alone.get(slot)
        if known is not None and known.row is self.rows[slot]:
            return known
        if len(self._alone) >= _MAX_ALONE:
            self._alone.clear()
        row = self.rows[slot]
        self._alone[slot] = alone = Alone(None, None, row)
        if row[1]:
            b = self.arena.new_zeros(row[1], sum(self.out_splits))
            self._fill_b(b, row)
            a = self._block(row[0], row[1], self.in_features)
            self._alone[slot] = alone = Alone(prepack(a), prepack(b.t()), row)
        return alone

    def stack(self, slots: tuple[int, ...]) -> Stack | None:
        """A copy of the slots' weights side by side.

        None where that is not worth it: their ranks differ too much, or these slots are asked for
        the first time in a row, so that they may not last. Only the last slots' copy is kept.
        """
        if self._stack is not None and self._stack.slots == slots and self._is_current(self._stack):
            return self._stack
        is_new, self._asked = slots != self._asked, slots
        ranks = [self.rows[slot][1] for slot in slots]
        if is_new or len(ranks) * max(ranks) > _MAX_PADDING * sum(ranks) or not max(ranks):
            return None
        a = self.arena.new_zeros(len(slots), max(ranks), self.in_features)
        b = self.arena.new_zeros(len(slots), max(ranks), sum(self.out_splits))
        for index, slot in enumerate(slots):
            row = self.rows[slot]
            a[index, : row[1]] = self._block(row[0], row[1], self.in_features)
            self._fill_b(b[index], row)
        self._stack = Stack(a, b, slots, tuple(self.rows[slot] for slot in slots))
        return self._stack

    def _is_current(self, stack: Stack) -> bool:
        pairs = zip(stack.slots, stack.rows, strict=True)
        return all(self.rows[slot] is row for slot, row in pairs)

    def _fill_b(self, b: torch.Tensor, row: Sequence[int]) -> None:
        """One slot's B, each rank's outputs in its target's columns of b [ranks, outs]."""
        h_start, y_start = 0, 0
        for width, rank, offset in zip(self.out_splits, row[2::2], row[3::2], strict=False):
            if rank:
                place = b[h_start : h_start + rank, y_start : y_start + width]
                place.copy_(self._block(offset, rank, width))
            h_start, y_start = h_start + rank, y_start + width

    def _block(self, offset: int, rows: int, columns: int) -> torch.Tensor:
        return self.arena[offset : offset + rows * columns].view(rows, columns)
