"""DeviceTier: the adapters the compute can use, in one arena, found through one table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lorafleet.cache.device_copies import Copy, copier_for
from lorafleet.cache.layout import ModelLayout
from lorafleet.cache.packed_form import ALIGNMENT, EMPTY_ROW, ROW_WIDTH, SiteRow
from lorafleet.cache.packing import PackedAdapter
from lorafleet.kernels.lora.weights import SiteWeights

__all__ = ["ALIGNMENT", "DeviceTier"]


@dataclass(frozen=True, slots=True)
class _Move:
    """A copy under way, and what must outlive it."""

    slot: int
    copy: Copy
    packed: PackedAdapter


class DeviceTier:
    """Obeys the router's moves; where adapters lie and which are evicted is its decision.

    Belongs to the thread that computes. `arena` is 1-D of the serving dtype; `table` is int64
    [num_slots + 1, num_sites, 8] on the device, rows as `packed_form.SiteRow`, slot 0 empty.
    """

    def __init__(
        self,
        arena_bytes: int,
        num_slots: int,
        layout: ModelLayout,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        num_sites = len(layout.sites)
        self.arena = torch.empty(arena_bytes // dtype.itemsize, dtype=dtype, device=device)
        self.table = torch.zeros(
            num_slots + 1, num_sites, ROW_WIDTH, dtype=torch.int64, device=device
        )
        self._rows: list[list[SiteRow]] = [[EMPTY_ROW] * (num_slots + 1) for _ in range(num_sites)]
        self._ranks = [0] * (num_slots + 1)
        self._parts: list[dict[str, torch.Tensor]] = [{} for _ in range(num_slots + 1)]
        self._layout, self._num_slots = layout, num_slots
        self._copier = copier_for(device)
        self._moves: list[_Move] = []

    def site(self, index: int) -> SiteWeights:
        """The weights of `layout.sites[index]`; stays valid, and current, through every move."""
        site = self._layout.sites[index]
        return SiteWeights(
            self.arena, self.table[:, index], self._rows[index], site.in_local, site.out_splits
        )

    def begin_move(self, packed: PackedAdapter, slot: int, arena_offset: int) -> None:
        """As `begin_scattered`, in one piece from byte `arena_offset`."""
        self.begin_scattered(packed, slot, [(arena_offset, packed.nbytes)])

    def begin_scattered(
        self, packed: PackedAdapter, slot: int, extents: Sequence[tuple[int, int]]
    ) -> None:
        """Starts copying an adapter to extents (offset, bytes) of the arena; binds it to `slot`.

        Returns at once; what is computed before `wait` names the slot must not use it. The slot
        and the bytes may have belonged to another adapter that earlier steps still read.
        """
        itemsize = self.arena.dtype.itemsize
        assert 1 <= slot <= self._num_slots, slot
        assert all(offset % ALIGNMENT == 0 for offset, _ in extents), extents
        assert packed.buffer.dtype == self.arena.dtype
        placement = packed.form.place(
            (offset // itemsize, nbytes // itemsize) for offset, nbytes in extents
        )
        assert all(run.offset + run.stop - run.start <= len(self.arena) for run in placement.runs)
        for site_rows, row in zip(self._rows, placement.rows, strict=True):
            site_rows[slot] = row
        self._ranks[slot] = max(rank for row in placement.rows for rank in row[2::2])
        self._parts[slot] = {
            part.name: self.arena[part.offset : part.offset + part.num_elements].view(part.shape)
            for part in placement.parts
        }
        # Page-locked like the buffer, by torch, which keeps it until the copy is done.
        host_rows = torch.tensor(placement.rows, pin_memory=self.arena.device.type == "cuda")
        copies = [
            (self.arena[offset : offset + stop - start], packed.buffer[start:stop])
            for start, stop, offset in placement.runs
        ]
        copy = self._copier.start([*copies, (self.table[slot], host_rows)])
        self._moves.append(_Move(slot, copy, packed))

    def rank(self, slot: int) -> int:
        """The largest rank of a slot's adapter at any site; 0 for slot 0."""
        return self._ranks[slot]

    def parts(self, slot: int) -> Mapping[str, torch.Tensor]:
        """The parts of a slot's adapter, in the arena; none for slot 0."""
        return self._parts[slot]

    def wait(self, slots: Iterable[int]) -> None:
        """Makes what is computed next see these slots' last move. Raises what broke a copy.

        On CUDA the compute stream waits and the host does not.
        """
        wanted = set(slots)
        for move in self._moves:
            if move.slot in wanted:
                move.copy.wait()

    def wait_all(self) -> None:
        """Makes what is computed next see every move."""
        for move in self._moves:
            move.copy.wait()

    def take_ready(self) -> list[int]:
        """Slots whose move finished since the last call. Raises what broke a copy."""
        ready = []
        while self._moves and self._moves[0].copy.is_done():
            ready.append(self._moves.pop(0).slot)
        return ready
