"""decode_attention: each token attends to its row's paged keys and values up to its own.

Semantics, for token i, of length n = positions[i] + 1, and query head q of key/value head g:
    s[j] = softcap * tanh(scale * <query[i, q], key j> / softcap)   (without softcap: scale * <...>)
    out[i, q] = sum_j softmax(s)[j] * value j      over max(0, n - window) <= j < n
    in float32, rounded once. Key j of the row lies in page page_table[rows[i], j // page_size], at
    j % page_size; the new token's own is among them.

Arguments:
    query         [num_tokens, heads, head_dim], fp16 or bf16, contiguous.
    keys, values  [num_pages, 16, kv_heads, head_dim]; heads / kv_heads is 1 .. 8.
    page_table    int64 [table_rows, max_pages].
    rows, positions, fresh   int64 [num_tokens]. From position `fresh` on, the kernel in front may
                  still be writing the row's keys and values; older ones are read at once.
    arrived       int32 [at least num_tokens * kv_heads], zero; the kernel leaves it zero. Launches
                  that may overlap need one each.

All but the shapes is read on the device: a captured launch serves any rows. head_dim 64 or 128.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache

import torch

from lorafleet.kernels.build import bind
from lorafleet.kernels.device import shared_bytes

_BLOCKS = 264  # of 4 warps, two for each multiprocessor: what runs at once
_LARGE_BLOCK_BYTES = 4 * 3 * 2 * 16 * 136 * 2  # of 4 warps: 3 pages of keys and values each
_LONG_CHUNK_PAGES, _LONG_ROW_CHUNKS = 64, 4
_MAX_GROUP = 8


def supports(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether there is a kernel for these shapes (on a CUDA device)."""
    return (
        dtype in (torch.float16, torch.bfloat16)
        and head_dim in (64, 128)
        and heads <= _MAX_GROUP * kv_heads
    )


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    fresh: torch.Tensor,
    arrived: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """See the module's docstring; [num_tokens, heads, head_dim]."""
    num_tokens, heads, head_dim = query.shape
    kv_heads = keys.shape[2]
    assert query.is_contiguous()
    group, units = heads // kv_heads, num_tokens * kv_heads
    warps, chunks, least_pages = _cut(units, page_table.shape[1], head_dim, query.device)
    out = torch.empty_like(query)
    partial = query.new_empty(units * chunks * group * (head_dim + 4), dtype=torch.float32)
    _entry()(
        int(query.dtype == torch.float16), head_dim, out.data_ptr(), partial.data_ptr(),
        arrived.data_ptr(), query.data_ptr(), keys.data_ptr(), values.data_ptr(),
        page_table.data_ptr(), page_table.stride(0), rows.data_ptr(), positions.data_ptr(),
        fresh.data_ptr(), num_tokens, kv_heads, group, chunks, warps, least_pages, scale,
        window or 0, softcap or 0.0, torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    return out


def _cut(units: int, max_pages: int, head_dim: int, device: torch.device) -> tuple[int, int, int]:
    """Warps of a block, chunks of a row at most, and pages that a chunk has at least.

    Where one wave has no room for all units, blocks are smaller, since two waves start and end
    twice, and only rows are cut for which the others would wait.
    """
    if units > _BLOCKS:
        return 2, max(1, min(_LONG_ROW_CHUNKS, max_pages // _LONG_CHUNK_PAGES)), _LONG_CHUNK_PAGES
    warps = 4 if head_dim == 64 or shared_bytes(device) >= _LARGE_BLOCK_BYTES else 2
    return warps, min(_BLOCKS // units, max_pages), warps


@cache
def _entry() -> Callable[..., None]:
    return bind(
        "lorafleet_decode_attention", c_int, c_int, *[c_void_p] * 7, c_int64, *[c_void_p] * 3,
        *[c_int] * 6, c_float, c_int, c_float, c_void_p,
    )  # fmt: skip
