"""The LoRA op on CUDA: shrink to float32 partial sums, then expand and add. See lora.cu.

Two forms. The decode form finds everything on the device, so that one captured graph serves every
mix of adapters: `shrink` may run on another stream beside the base product, `expand_` follows both.
The prefill form takes long segments, cut into tiles by the host.

Arguments:
    x          [num_tokens, in_local], y [num_tokens, sum(out_splits)]: fp16 or bf16, contiguous.
    row_slots  int32 [num_tokens]; equal slots side by side share the loads of their weights.
    tiles      int32 [num_tiles, 3]: slot, first token, end; at most TILE_TOKENS tokens each.
    max_rank   at least the rank of every target of every slot in use, 1 .. 512.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import Structure, c_int, c_int64, c_void_p
from functools import cache
from typing import NamedTuple

import torch

from lorafleet.kernels.build import bind
from lorafleet.kernels.linear import cuda as skinny
from lorafleet.kernels.lora.weights import SiteWeights

TILE_TOKENS = 64
_RANK_TILE = 16  # ranks of one shrink block
_MIN_SPLIT = 512  # features of x that a block reads at least
_GUEST_BLOCKS = 64  # of a shrink that shares its launch: few, since the product needs the rest
_WAVE_BLOCKS = 264  # two for each multiprocessor of the largest device


class Shrunk(NamedTuple):
    """x @ A^T in `splits` parts: float32 [splits, num_tokens, capacity]."""

    partial: torch.Tensor
    max_rank: int


def shrink(x: torch.Tensor, site: SiteWeights, row_slots: torch.Tensor, max_rank: int) -> Shrunk:
    """Decode form, first half: every token's x @ A^T of its slot. Tokens of slot 0 get nothing."""
    num_tokens = len(x)
    capacity = max_rank * len(site.out_splits)
    splits = _splits(num_tokens * -(-capacity // _RANK_TILE), site.in_features)
    partial = x.new_empty(splits, num_tokens, capacity, dtype=torch.float32)
    _entry_shrink()(
        _is_half(x), partial.data_ptr(), x.data_ptr(), site.arena.data_ptr(),
        site.table.data_ptr(), site.table.stride(0), site.in_features, row_slots.data_ptr(),
        num_tokens, capacity, splits, _stream(),
    )  # fmt: skip
    return Shrunk(partial, max_rank)


def shrink_with_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    site: SiteWeights,
    row_slots: torch.Tensor,
    max_rank: int,
) -> tuple[torch.Tensor, Shrunk]:
    """x @ weight^T + bias, and `shrink`, in one launch; for what `linear.cuda.supports`."""
    capacity = max_rank * len(site.out_splits)
    splits = _splits(len(x) * -(-capacity // _RANK_TILE), site.in_features, _GUEST_BLOCKS)
    partial = x.new_empty(splits, len(x), capacity, dtype=torch.float32)
    addresses = (
        partial.data_ptr(), site.arena.data_ptr(), site.table.data_ptr(), site.table.stride(0),
        row_slots.data_ptr(), capacity, splits,
    )  # fmt: skip
    return skinny.linear(x, weight, bias, addresses), Shrunk(partial, max_rank)


def expand_(y: torch.Tensor, shrunk: Shrunk, site: SiteWeights, row_slots: torch.Tensor) -> None:
    """Decode form, second half: adds every token's shrunk @ B of its slot to y."""
    splits, num_tokens, capacity = shrunk.partial.shape
    _entry_expand()(
        _is_half(y), y.data_ptr(), shrunk.partial.data_ptr(), site.arena.data_ptr(),
        site.table.data_ptr(), site.table.stride(0), *_outs(site), row_slots.data_ptr(),
        num_tokens, capacity, shrunk.max_rank, splits, _stream(),
    )  # fmt: skip


class PendingArguments(Structure):
    """`Pending` of expand.cuh."""

    _fields_ = (
        ("partial", c_void_p),
        ("arena", c_void_p),
        ("table", c_void_p),
        ("stride", c_int64),
        ("in_features", c_int),
        ("outs", c_int * 3),
        ("row_slots", c_void_p),
        ("num_tokens", c_int),
        ("capacity", c_int),
        ("splits", c_int),
    )


def pending_arguments(
    shrunk: Shrunk, site: SiteWeights, row_slots: torch.Tensor
) -> PendingArguments:
    """What `expand_` would add, for a kernel that adds it while it reads the product."""
    splits, num_tokens, capacity = shrunk.partial.shape
    return PendingArguments(
        shrunk.partial.data_ptr(), site.arena.data_ptr(), site.table.data_ptr(),
        site.table.stride(0), site.in_features, _outs(site), row_slots.data_ptr(), num_tokens,
        capacity, splits,
    )  # fmt: skip


def prefill_add_(
    y: torch.Tensor, x: torch.Tensor, site: SiteWeights, tiles: torch.Tensor, max_rank: int
) -> None:
    """Prefill form: both halves over the tiles."""
    num_tokens, num_tiles = len(x), len(tiles)
    capacity = max_rank * len(site.out_splits)
    splits = _splits(num_tiles * -(-capacity // TILE_TOKENS), site.in_features)
    partial = x.new_empty(splits, num_tokens, capacity, dtype=torch.float32)
    h = x.new_empty(num_tokens, capacity)
    _entry_prefill()(
        _is_half(x), y.data_ptr(), h.data_ptr(), partial.data_ptr(), x.data_ptr(),
        site.arena.data_ptr(), site.table.data_ptr(), site.table.stride(0), site.in_features,
        *_outs(site), tiles.data_ptr(), num_tiles, num_tokens, capacity, splits, _stream(),
    )  # fmt: skip


def tiles_of(segments: Sequence[tuple[int, int, int]]) -> torch.Tensor:
    """Segments (slot, start, stop) cut into tiles, on the host."""
    cut = [
        (slot, first, min(first + TILE_TOKENS, stop))
        for slot, start, stop in segments
        for first in range(start, stop, TILE_TOKENS)
    ]
    return torch.tensor(cut, dtype=torch.int32)


def _splits(num_blocks: int, in_features: int, wanted: int = _WAVE_BLOCKS) -> int:
    return max(1, min(in_features // _MIN_SPLIT, -(-wanted // num_blocks)))


def _outs(site: SiteWeights) -> tuple[int, ...]:
    return (*site.out_splits, 0, 0)[:3]


def _is_half(tensor: torch.Tensor) -> int:
    assert tensor.is_contiguous()
    return int(tensor.dtype == torch.float16)


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


_POINTERS = (c_void_p,) * 2
_SITE = (c_void_p, c_void_p, c_int64)  # arena, table, row stride


@cache
def _entry_shrink() -> Callable[..., None]:
    return bind(
        "lorafleet_lora_shrink", c_int, *_POINTERS, *_SITE, c_int, c_void_p, *[c_int] * 3, c_void_p
    )


@cache
def _entry_expand() -> Callable[..., None]:
    return bind(
        "lorafleet_lora_expand", c_int, *_POINTERS, *_SITE, *[c_int] * 3, c_void_p, *[c_int] * 4,
        c_void_p,
    )  # fmt: skip


@cache
def _entry_prefill() -> Callable[..., None]:
    return bind(
        "lorafleet_lora_prefill", c_int, *_POINTERS, *_POINTERS, *_SITE, *[c_int] * 4, c_void_p,
        *[c_int] * 4, c_void_p,
    )  # fmt: skip
