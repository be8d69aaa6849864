"""The LoRA op on CUDA: shrink to float32 partial sums, then expand and add.

Two forms. The decode form (decode.cu) finds everything on the device, so that one captured graph
serves every mix of adapters. The prefill form (prefill.cu) takes long segments, cut into tiles by
the host.

Arguments:
    x          [num_tokens, in_local], y [num_tokens, sum(out_splits)]: fp16 or bf16, contiguous.
    row_slots  int32 [num_tokens]; equal slots side by side share the loads of their weights. The
               kernels may read them, and the table, before the kernel in front has ended: they are
               written by something that another, ordinary operation has waited for.
    tiles      int32 [num_tiles, 3]: slot, first token, end; up to TILE_TOKENS tokens each.
    max_rank   at least the rank of every target of every slot in use, 1 .. 512.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import Structure, byref, c_int, c_int64, c_void_p
from functools import cache
from typing import NamedTuple

import torch

from lorafleet.kernels.build import bind
from lorafleet.kernels.linear import cuda as stream
from lorafleet.kernels.lora.weights import SiteArguments, SiteWeights

TILE_TOKENS = 64
MAX_SITE_TARGETS = 3
_RANK_TILE = 16  # ranks of one shrink item
_PIECE = 8  # elements in 16 bytes
_MIN_SPLIT = 512  # features of x that an item reads at least
_WAVE_ITEMS = 264  # two for each multiprocessor of the largest device
_WAVE_TILES = 396  # three, which are as many as it has room for
GROUP = 8  # tokens side by side that share the reads of their weights
# Tokens times their largest rank; beyond, a product's spare warps are too few for the bytes of A.
_MAX_CARRIED = 1024
_MAX_PIECES = (
    8  # of an update in its product's launch, as update.cuh lists them: more are faster apart
)


class Shrunk(NamedTuple):
    """x @ A^T in `splits` parts: float32 [splits, num_tokens, capacity]."""

    partial: torch.Tensor
    max_rank: int


class ShrunkTiles(NamedTuple):
    """x @ A^T of tokens in tiles: serving dtype [num_tokens, capacity], a slot's ranks of it."""

    h: torch.Tensor
    tiles: torch.Tensor
    max_rank: int


def shrink(x: torch.Tensor, site: SiteWeights, row_slots: torch.Tensor, max_rank: int) -> Shrunk:
    """Decode form, first half: every token's x @ A^T of its slot. Tokens of slot 0 get nothing."""
    shrunk = _empty(x, site, max_rank)
    work = _shrink_arguments(shrunk, site, row_slots)
    _entry_shrink()(_is_half(x), x.data_ptr(), byref(work), _stream())
    return shrunk


def shrink_with_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    site: SiteWeights,
    row_slots: torch.Tensor,
    max_rank: int,
) -> tuple[torch.Tensor, Shrunk]:
    """x @ weight^T + bias, and `shrink`, in one launch; for what `linear.cuda.supports`."""
    shrunk = _empty(x, site, max_rank)
    return stream.linear(x, weight, bias, _shrink_arguments(shrunk, site, row_slots)), shrunk


def are_carried(num_tokens: int, max_rank: int) -> bool:
    """Whether rows so many, of such ranks, are few enough for `shrink_with_linear`."""
    return num_tokens * max_rank <= _MAX_CARRIED


def updated_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    site: SiteWeights,
    row_slots: torch.Tensor,
    max_rank: int,
) -> torch.Tensor:
    """silu(gate) * up of x @ weight^T + bias and the update of both, in one launch.

    For what `linear.cuda.supports_gated`, and rows that `are_few`. The outputs are gate, then up,
    as one target or two. Products and updates are added before they are rounded.
    """
    shrunk = _empty(x, site, max_rank)  # held until the launch
    return stream.linear(x, weight, bias, _shrink_arguments(shrunk, site, row_slots), is_gated=True)


def are_few(num_tokens: int, num_groups: int, max_rank: int) -> bool:
    """Whether `updated_silu` is the faster way for rows of such ranks.

    `num_groups`: every slot counts in each GROUP of tokens, from the first on, where it occurs.
    """
    ranks = -(-max_rank // _RANK_TILE)
    pieces = num_groups * ranks
    return pieces <= _MAX_PIECES and are_carried(num_tokens, ranks * _RANK_TILE)


def expand_(y: torch.Tensor, shrunk: Shrunk, site: SiteWeights, row_slots: torch.Tensor) -> None:
    """Decode form, second half: adds every token's shrunk @ B of its slot to y."""
    splits, num_tokens, capacity = shrunk.partial.shape
    _entry_expand()(
        _is_half(y), y.data_ptr(), shrunk.partial.data_ptr(), site.arena.data_ptr(),
        site.table.data_ptr(), site.table.stride(0), *_outs(site), row_slots.data_ptr(),
        num_tokens, capacity, shrunk.max_rank, splits, _stream(),
    )  # fmt: skip


class _Shrink(Structure):
    """`Shrink` of shrink.cuh."""

    _fields_ = (
        ("site", SiteArguments),
        ("row_slots", c_void_p),
        ("partial", c_void_p),
        ("num_tokens", c_int),
        ("capacity", c_int),
        ("splits", c_int),
    )


class PendingArguments(Structure):
    """`Pending` of expand.cuh."""

    _fields_ = (
        ("site", SiteArguments),
        ("capacity", c_int),
        ("partial", c_void_p),
        ("row_slots", c_void_p),
        ("num_tokens", c_int),
        ("splits", c_int),
        ("h", c_void_p),
        ("tiles", c_void_p),
        ("num_tiles", c_int),
    )


def pending_arguments(
    shrunk: Shrunk | ShrunkTiles, site: SiteWeights, row_slots: torch.Tensor
) -> PendingArguments:
    """What an expand would add, for a kernel that adds it while it reads the product."""
    found = PendingArguments(site=site.arguments, row_slots=row_slots.data_ptr())
    if isinstance(shrunk, Shrunk):
        found.partial = shrunk.partial.data_ptr()
        found.splits, found.num_tokens, found.capacity = shrunk.partial.shape
    else:
        found.h, found.tiles = shrunk.h.data_ptr(), shrunk.tiles.data_ptr()
        found.num_tiles = len(shrunk.tiles)
        found.num_tokens, found.capacity = shrunk.h.shape
    return found


def _shrink_arguments(shrunk: Shrunk, site: SiteWeights, row_slots: torch.Tensor) -> _Shrink:
    splits, num_tokens, capacity = shrunk.partial.shape
    return _Shrink(
        site.arguments, row_slots.data_ptr(), shrunk.partial.data_ptr(), num_tokens,
        capacity, splits,
    )  # fmt: skip


def _empty(x: torch.Tensor, site: SiteWeights, max_rank: int) -> Shrunk:
    num_tokens, capacity = len(x), max_rank * len(site.out_splits)
    splits = _splits(num_tokens * -(-capacity // _RANK_TILE), site.in_features)
    return Shrunk(x.new_empty(splits, num_tokens, capacity, dtype=torch.float32), max_rank)


def shrink_tiles(
    x: torch.Tensor,
    site: SiteWeights,
    row_slots: torch.Tensor,
    tiles: torch.Tensor,
    arrived: torch.Tensor,
    max_rank: int,
) -> ShrunkTiles:
    """Prefill form, first half; the tiles cover every token.

    `arrived`: as `counters_for` makes it; zero again when the operation ends.
    """
    num_tokens = len(x)
    capacity = -(-max_rank * len(site.out_splits) // _PIECE) * _PIECE
    # Full tiles alone would do with few splits, but of a captured step's tiles most may be empty.
    full = -(-num_tokens // TILE_TOKENS) * -(-capacity // TILE_TOKENS)
    splits = max(1, min(site.in_features // _MIN_SPLIT, _WAVE_TILES // full))
    parts = splits if splits > 1 else 0  # one alone is h at once
    partial = x.new_empty(parts, num_tokens, capacity, dtype=torch.float32)
    shrunk = ShrunkTiles(x.new_empty(num_tokens, capacity), tiles, max_rank)
    work = pending_arguments(shrunk, site, row_slots)
    work.splits = splits
    _entry_shrink_tiles()(
        _is_half(x), x.data_ptr(), partial.data_ptr(), arrived.data_ptr(), byref(work), _stream()
    )
    return shrunk


def expand_tiles_(
    y: torch.Tensor, shrunk: ShrunkTiles, site: SiteWeights, row_slots: torch.Tensor
) -> None:
    """Prefill form, second half: adds every token's shrunk @ B of its slot to y."""
    work = pending_arguments(shrunk, site, row_slots)
    _entry_expand_tiles()(_is_half(y), y.data_ptr(), byref(work), _stream())


def tiles_of(segments: Sequence[tuple[int, int, int]], num_tokens: int) -> torch.Tensor:
    """Segments (slot, start, stop), and what lies between as slot 0, cut into tiles on the host."""
    whole, end = [], 0
    for slot, start, stop in (*segments, (0, num_tokens, num_tokens)):
        whole += [(0, end, start), (slot, start, stop)]
        end = stop
    cut = [
        (slot, first, min(first + TILE_TOKENS, stop))
        for slot, start, stop in whole
        for first in range(start, stop, TILE_TOKENS)
    ]
    return torch.tensor(cut, dtype=torch.int32)


def counters_for(tiles: torch.Tensor, max_rank: int) -> torch.Tensor:
    """Zeros, one for each piece of work of `shrink_tiles` at any site."""
    rank_tiles = -(-(MAX_SITE_TARGETS * max_rank + _PIECE) // TILE_TOKENS)
    return torch.zeros(len(tiles) * rank_tiles, dtype=torch.int32, device=tiles.device)


def _splits(num_items: int, in_features: int) -> int:
    return max(1, min(in_features // _MIN_SPLIT, -(-_WAVE_ITEMS // num_items)))


def _outs(site: SiteWeights) -> tuple[int, ...]:
    return (*site.out_splits, 0, 0)[:3]


def _is_half(tensor: torch.Tensor) -> int:
    assert tensor.is_contiguous()
    return int(tensor.dtype == torch.float16)


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """For work beside the products: one for the device, whose steps one thread computes."""
    return torch.cuda.Stream(device)


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


_POINTERS = (c_void_p,) * 2
_SITE = (c_void_p, c_void_p, c_int64)  # arena, table, row stride


@cache
def _entry_shrink() -> Callable[..., None]:
    return bind("lorafleet_lora_shrink", c_int, *_POINTERS, c_void_p)


@cache
def _entry_expand() -> Callable[..., None]:
    return bind(
        "lorafleet_lora_expand", c_int, *_POINTERS, *_SITE, *[c_int] * 3, c_void_p, *[c_int] * 4,
        c_void_p,
    )  # fmt: skip


@cache
def _entry_shrink_tiles() -> Callable[..., None]:
    return bind("lorafleet_lora_shrink_tiles", c_int, *[c_void_p] * 5)


@cache
def _entry_expand_tiles() -> Callable[..., None]:
    return bind("lorafleet_lora_expand_tiles", c_int, *[c_void_p] * 3)
