"""lora_add_: one site's LoRA update for a whole mixed batch.

Semantics:
    y[t, range_i] += (x[t] @ A_i^T) @ B_i        for every token t with slot s = row_slots[t] > 0
    and every target i of the site that s's adapter has; A_i is [rank_i, in_local], B_i is
    [rank_i, out_i] with the adapter's scale folded in, range_i is target i's part of y.
    The product x @ A^T is rounded to x's dtype. Rows of slot 0 keep their bits.

Arguments:
    y       [num_tokens, sum(out_splits)], serving dtype; written in place.
    x       [num_tokens, in_local], serving dtype; read.
    site    arena, table and rows of the site: SiteWeights.
    batch   which token has which slot: LoraBatch. Nothing is launched when it is empty.

On CUDA the op has two halves. `lora_product` computes the first, in a decode step on Hopper in the
launch of the base product, and leaves the second to the operation that reads y next: see Pending.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

import torch

from lorafleet.kernels.linear import cuda as stream
from lorafleet.kernels.linear.op import linear
from lorafleet.kernels.lora import cuda
from lorafleet.kernels.lora.cuda import Shrunk, ShrunkTiles
from lorafleet.kernels.lora.weights import SiteWeights, Stack

Segment = tuple[int, int, int]  # slot, start, stop

_MAX_GRID_ROWS = 16  # longer segments keep the CPU busy by themselves
_MAX_PADDING = 2  # rows with padding over rows without, in a grid
# What the decode form of the kernels is made for; longer segments go to tensor cores.
MAX_DECODE_TOKENS = 256
_MAX_DECODE_SEGMENT = 16
# Shorter steps take the host about as long to launch as the device to compute: no time for more.
_MIN_TOKENS_BESIDE = 2048


class PaddedRows(NamedTuple):
    """The tokens of some segments as a [num_segments, longest] grid."""

    tokens: slice | torch.Tensor  # cell by cell; a slice where they are one run without padding
    kept: torch.Tensor  # int64, the cells that are not padding
    owners: torch.Tensor  # int64, the token of each kept cell
    slots: tuple[int, ...]  # of each segment


@dataclass(frozen=True)
class LoraBatch:
    """Which token has which slot, on the device (`row_slots`) and on the host (`segments`).

    `row_slots`: int32 [num_tokens]. `segments`: (slot, start, stop) of every run of tokens with the
    same slot other than 0, in the order of the tokens. `max_rank`: at least the rank of every
    adapter in use; the CUDA kernels need it.
    """

    row_slots: torch.Tensor
    segments: tuple[Segment, ...]
    max_rank: int = 0
    is_captured: bool = False  # row_slots is read when the graph is replayed; no segments are known
    captured_tiles: torch.Tensor | None = None  # read then as well
    is_few: bool = False  # captured for such alone, see cuda.are_few

    @classmethod
    def none(cls, device: torch.device) -> Self:
        """A batch without adapters."""
        return cls(torch.empty(0, dtype=torch.int32, device=device), ())

    @classmethod
    def captured(
        cls,
        row_slots: torch.Tensor,
        max_rank: int,
        tiles: torch.Tensor | None = None,
        is_few: bool = False,
    ) -> Self:
        """Tokens of any slots whose ranks are `max_rank` or less; if `is_few`, of few slots alone.

        `tiles`: int32 [num_tiles, 3] on the device as `cuda.tiles_of` cuts them, empty ones last;
        without, the decode form of the kernels serves them.
        """
        return cls(row_slots, (), max_rank, True, tiles, is_few)

    @property
    def is_empty(self) -> bool:
        """Whether no token has an adapter."""
        return not (self.segments or self.is_captured)

    @cached_property
    def is_decode(self) -> bool:
        """Whether the decode form of the CUDA kernels suits the batch."""
        if self.captured_tiles is not None:
            return False
        longest = max((stop - start for _, start, stop in self.segments), default=1)
        return len(self.row_slots) <= MAX_DECODE_TOKENS and longest <= _MAX_DECODE_SEGMENT

    @cached_property
    def tiles(self) -> torch.Tensor:
        """All tokens as the prefill form of the CUDA kernels takes them, on the device."""
        if self.captured_tiles is not None:
            return self.captured_tiles
        tiles = cuda.tiles_of(self.segments, len(self.row_slots)).pin_memory()
        return tiles.to(self.row_slots.device, non_blocking=True)

    @cached_property
    def arrived(self) -> torch.Tensor:
        """Counters for the shrink of `tiles`."""
        return cuda.counters_for(self.tiles, self.max_rank)

    @cached_property
    def tail(self) -> int:
        """The token from which on segments are short enough to be computed side by side."""
        starts = [start for _, start, stop in self.segments if stop - start > _MAX_GRID_ROWS]
        following = [start for _, start, _ in self.segments if start > max(starts, default=-1)]
        return following[0] if following else len(self.row_slots)

    @cached_property
    def head(self) -> tuple[Segment, ...]:
        """The segments before `tail`."""
        return tuple(segment for segment in self.segments if segment[1] < self.tail)

    @cached_property
    def grid(self) -> PaddedRows | None:
        """The segments from `tail` on side by side; None where padding prevails or there is one."""
        return _padded(self.segments[len(self.head) :], self.row_slots.device)


class Pending(NamedTuple):
    """What a product still lacks: shrunk @ B of each row's slot.

    Whoever reads the product next adds it, before anything else, and rounds the sum to the serving
    dtype: `lora_add_` does, or a fused operation that takes it as an argument.
    """

    shrunk: Shrunk | ShrunkTiles
    site: SiteWeights
    row_slots: torch.Tensor

    @property
    def is_tiled(self) -> bool:
        """Whether it is of long segments."""
        return isinstance(self.shrunk, ShrunkTiles)

    @property
    def max_rank(self) -> int:
        """At least the rank of every target of every slot in use."""
        return self.shrunk.max_rank

    def add_(self, y: torch.Tensor) -> None:
        """Finishes the product in place."""
        if isinstance(self.shrunk, ShrunkTiles):
            cuda.expand_tiles_(y, self.shrunk, self.site, self.row_slots)
        else:
            cuda.expand_(y, self.shrunk, self.site, self.row_slots)


def lora_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    site: SiteWeights,
    batch: LoraBatch,
) -> tuple[torch.Tensor, Pending | None]:
    """x @ weight^T + bias, then `lora_add_` to it, or what of that is still pending.

    The product is the one of a batch without adapters, so rows of slot 0 keep its bits.
    """
    if batch.is_empty or not site.has_kernels:
        y = linear(x, weight, bias)
        lora_add_(y, x, site, batch)
        return y, None
    slots, max_rank = batch.row_slots, batch.max_rank
    if not batch.is_decode:
        y, tiled = _tiled_product(x, weight, bias, site, batch)
        return y, Pending(tiled, site, slots)
    if cuda.are_carried(len(x), max_rank) and stream.supports(x, weight):
        y, shrunk = cuda.shrink_with_linear(x, weight, bias, site, slots, max_rank)
    else:
        shrunk = cuda.shrink(x, site, slots, max_rank)
        y = linear(x, weight, bias)
    return y, Pending(shrunk, site, slots)


def _tiled_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    site: SiteWeights,
    batch: LoraBatch,
) -> tuple[torch.Tensor, ShrunkTiles]:
    """x @ weight^T + bias, and the shrink of tiles: beside the product where it takes long.

    The product has the device first; the shrink's blocks go where its last ones leave room.
    """
    shrink = (x, site, batch.row_slots, batch.tiles, batch.arrived, batch.max_rank)
    if len(x) < _MIN_TOKENS_BESIDE:
        return linear(x, weight, bias), cuda.shrink_tiles(*shrink)
    present, beside = torch.cuda.current_stream(), cuda.side_stream(x.device)
    beside.wait_stream(present)
    y = linear(x, weight, bias)
    with torch.cuda.stream(beside):
        # What is made here goes back to this stream, whose next use of it waits as this one did.
        tiled = cuda.shrink_tiles(*shrink)
    present.wait_stream(beside)
    return y, tiled


def lora_add_(y: torch.Tensor, x: torch.Tensor, site: SiteWeights, batch: LoraBatch) -> None:
    """See the module's docstring."""
    if batch.is_empty:
        return
    assert x.shape[1] == site.in_features
    assert y.shape == (x.shape[0], sum(site.out_splits))
    if not site.has_kernels:
        _add_in_torch_(y, x, site, batch)
    elif batch.is_decode:
        shrunk = cuda.shrink(x, site, batch.row_slots, batch.max_rank)
        cuda.expand_(y, shrunk, site, batch.row_slots)
    else:
        tiled = cuda.shrink_tiles(
            x, site, batch.row_slots, batch.tiles, batch.arrived, batch.max_rank
        )
        cuda.expand_tiles_(y, tiled, site, batch.row_slots)


def _add_in_torch_(y: torch.Tensor, x: torch.Tensor, site: SiteWeights, batch: LoraBatch) -> None:
    stack = site.stack(batch.grid.slots) if batch.grid is not None else None
    if batch.grid is None or stack is None:
        _add_by_segment_(y, x, site, batch.segments)
        return
    _add_by_segment_(y, x, site, batch.head)
    _add_stacked_(y, x, stack, batch.grid)


def _add_stacked_(y: torch.Tensor, x: torch.Tensor, stack: Stack, grid: PaddedRows) -> None:
    h = torch.bmm(x[grid.tokens].unflatten(0, (len(grid.slots), -1)), stack.a.transpose(1, 2))
    added = torch.bmm(h, stack.b).flatten(0, 1)
    if isinstance(grid.tokens, slice):
        y[grid.tokens].add_(added)
    else:
        y.index_add_(0, grid.owners, added[grid.kept])


def _add_by_segment_(
    y: torch.Tensor, x: torch.Tensor, site: SiteWeights, segments: Sequence[Segment]
) -> None:
    for slot, start, stop in segments:
        alone = site.alone(slot)
        if alone.a is not None and alone.b is not None:
            y[start:stop].add_(linear(linear(x[start:stop], alone.a), alone.b))


def _padded(segments: Sequence[Segment], device: torch.device) -> PaddedRows | None:
    """Each segment padded with its first token to the longest one's length."""
    longest = max((stop - start for _, start, stop in segments), default=0)
    rows = sum(stop - start for _, start, stop in segments)
    if len(segments) < 2 or len(segments) * longest > _MAX_PADDING * rows:
        return None
    cells: list[int] = []
    kept: list[int] = []
    owners: list[int] = []
    for _, start, stop in segments:
        kept += range(len(cells), len(cells) + stop - start)
        owners += range(start, stop)
        cells += [*range(start, stop), *[start] * (longest - (stop - start))]
    run = slice(cells[0], cells[-1] + 1)
    is_run = cells == list(range(run.start, run.stop))
    return PaddedRows(
        run if is_run else torch.tensor(cells, device=device),
        torch.tensor(kept, device=device),
        torch.tensor(owners, device=device),
        tuple(slot for slot, _, _ in segments),
    )
