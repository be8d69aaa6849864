"""Tensor-parallel layers: what takes the place of a decoder's linears.

Every linear of a decoder layer ends up in one of two forms. Column-parallel ones that share an
input (q/k/v, gate/up) are merged into one GEMM and one LoRA site; row-parallel ones (o, down) sum
over the ranks. LoRA is added before that sum, so an adapter costs no extra collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from lorafleet.cache.layout import LoraSite
from lorafleet.cache.linear_parts import scale_shift_name
from lorafleet.kernels.fused.op import silu_mul, silu_product
from lorafleet.kernels.linear.op import linear, prepack
from lorafleet.kernels.lora.op import LoraBatch, Pending, lora_product
from lorafleet.kernels.lora.weights import SiteWeights
from lorafleet.shard.group import Group

Segments = Sequence[tuple[int, int, int]]  # (slot, start, stop) of runs of rows


class SlotParts(NamedTuple):
    """A run of tokens whose adapter has parts."""

    tensors: Mapping[str, torch.Tensor]  # by name, on the device
    start: int
    stop: int


def slot_parts(
    segments: Segments, parts_of: Callable[[int], Mapping[str, torch.Tensor]]
) -> tuple[SlotParts, ...]:
    """Of these runs those whose adapter has parts; `parts_of` gives a slot's."""
    return tuple(
        SlotParts(tensors, start, stop)
        for slot, start, stop in segments
        if (tensors := parts_of(slot))
    )


class LoraState:
    """The step's adapter rows, as every layer reads them. Set by the decoder before each forward.

    `parts`: of the step's tokens, those whose adapter has more than LoRA on linear layers.
    """

    def __init__(self, device: torch.device) -> None:
        self.batch = LoraBatch.none(device)
        self.parts: tuple[SlotParts, ...] = ()

    def begin(
        self, batch: LoraBatch, parts_of: Callable[[int], Mapping[str, torch.Tensor]]
    ) -> None:
        """A forward over the rows of `batch` begins; `parts_of` gives a slot's parts."""
        self.batch = batch
        self.parts = slot_parts(batch.segments, parts_of)


class Site(nn.Module):
    """A linear, or several merged into one, with adapters on top: y = x @ W^T + LoRA.

    `weight` is this rank's [out_local, in_local]; rows follow `layout.targets`.
    """

    def __init__(
        self, layout: LoraSite, has_bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.layout = layout
        self.widths = [target.out_local for target in layout.targets]
        self._scale_shifts = [scale_shift_name(target.name) for target in layout.targets]
        rows, columns = sum(self.widths), layout.targets[0].in_local
        self.weight = _parameter((rows, columns), dtype, device)
        self.bias = _parameter((rows,), dtype, device) if has_bias else None
        self._lora: LoraState | None = None
        self._adapters: SiteWeights | None = None

    def prepack(self) -> None:
        """Puts the loaded weight into the layout that is multiplied fastest."""
        self.weight = nn.Parameter(prepack(self.weight), requires_grad=False)

    def attach(self, state: LoraState, adapters: SiteWeights) -> None:
        """Gives the site its adapters' weights and the step's rows."""
        self._lora, self._adapters = state, adapters

    def product(self, rows: torch.Tensor) -> tuple[torch.Tensor, Pending | None]:
        """`project`, but for what the operation that reads it next has still to add."""
        raise NotImplementedError

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in_local] -> [num_tokens, out], adapters included."""
        y, pending = self.product(rows)
        if pending is not None:
            pending.add_(y)
        return y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`project` as transformers calls it: [1, num_tokens, in] -> [1, num_tokens, out]."""
        return self.project(x[0]).unsqueeze(0)

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, Pending | None]:
        """x @ W^T + bias, [num_tokens, out_local], and what its rows' adapters have yet to add."""
        if self._lora is None or self._adapters is None:
            return linear(x, self.weight, bias), None
        return lora_product(x, self.weight, bias, self._adapters, self._lora.batch)

    def adjusted(
        self, y: torch.Tensor, pending: Pending | None
    ) -> tuple[torch.Tensor, Pending | None]:
        """A product with what its adapters do to it besides their updates, which come before."""
        adjustments = self.adjustments(y)
        if not adjustments:
            return y, pending
        if pending is not None:
            pending.add_(y)
        for view, scale_shift in adjustments:
            view.mul_(scale_shift[0]).add_(scale_shift[1])
        return y, None

    def adjustments(self, y: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Views of y [num_tokens, out_local] whose adapters scale and shift them, and by what."""
        if self._lora is None or not self._lora.parts:
            return []
        return [
            (view, found)
            for slot in self._lora.parts
            for name, view in self._views(y, slot)
            if (found := slot.tensors.get(name)) is not None
        ]

    def _views(self, y: torch.Tensor, slot: SlotParts) -> Iterator[tuple[str, torch.Tensor]]:
        views = y[slot.start : slot.stop].split(self.widths, dim=1)
        return zip(self._scale_shifts, views, strict=True)


class ColumnSite(Site):
    """Column-parallel linears over one input; each rank holds a part of the outputs."""

    def __init__(
        self, layout: LoraSite, has_bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(layout, has_bias, dtype, device)
        self._parts: tuple[torch.Tensor, ...] = ()

    def product(self, rows: torch.Tensor) -> tuple[torch.Tensor, Pending | None]:
        """[num_tokens, in] -> [num_tokens, out_local]."""
        return self.adjusted(*self.multiply(rows, self.bias))

    def activated(self, rows: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up, of a site of these two: [num_tokens, out_local / 2]."""
        if self._lora is None or self._adapters is None:
            return silu_product(rows, self.weight, self.bias)
        if self._lora.parts:  # they may scale and shift gate and up
            return silu_mul(*self.product(rows))
        return silu_product(rows, self.weight, self.bias, (self._adapters, self._lora.batch))

    def part(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """The output of member `index`; the first member computes all of them.

        A decoder layer calls its members in order and with the same input, so the others only
        pick up their share, and the last one lets go of the whole.
        """
        if index == 0:
            self._parts = self(x).split(self.widths, dim=-1)
        part = self._parts[index]
        if index == len(self.widths) - 1:
            self._parts = ()
        return part


class ColumnMember(nn.Module):
    """Stands where the model expects one linear of a merged site."""

    def __init__(self, site: ColumnSite, index: int) -> None:
        super().__init__()
        self._site = [site]  # in a list, so that the site's weights are not registered twice
        self._index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[1, num_tokens, in] -> [1, num_tokens, out_local of this member]."""
        return self._site[0].part(x, self._index)


class RowSite(Site):
    """A row-parallel linear; each rank holds a part of the inputs and the ranks' outputs sum."""

    def __init__(
        self,
        layout: LoraSite,
        has_bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        group: Group,
    ) -> None:
        super().__init__(layout, has_bias, dtype, device)
        self._group = group

    def product(self, rows: torch.Tensor) -> tuple[torch.Tensor, Pending | None]:
        """[num_tokens, in_local] -> [num_tokens, out], summed over the ranks."""
        if self._group.size == 1:
            return self.adjusted(*self.multiply(rows, self.bias))
        y, pending = self.multiply(rows, None)
        if pending is not None:
            pending.add_(y)  # each rank has its own part of it
        adjustments = self.adjustments(y)
        for view, scale_shift in adjustments:
            view.mul_(scale_shift[0])
        self._group.all_reduce_(y)
        if self.bias is not None:
            y += self.bias  # once, after the sum
        for view, scale_shift in adjustments:
            view.add_(scale_shift[1])
        return y, None


def _parameter(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
