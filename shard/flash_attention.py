"""Attention of mixed steps by FlashInfer: planned once a step, run once a layer.

Prefill rows and decode rows go in one launch, over the paged KV pool.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch

from lorafleet.shard.attention import AttentionKind
from lorafleet.shard.config import PAGE_SIZE
from lorafleet.shard.kv_pool import KvPool
from lorafleet.shard.transfers import to_device

# Its scratch for partial results of long rows, as its documentation recommends.
_WORKSPACE_BYTES = 128 << 20
_TILE = 128  # (token, head of a group) pairs of one block, at most
_HEAD_DIMS = (64, 128, 256)
_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class RowPages:
    """Rows of a step on the host: new tokens, keys in the end, and the pages that hold them."""

    token_counts: Sequence[int]
    lengths: Sequence[int]
    pages: Sequence[torch.Tensor]  # per row: int32 on the host

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token and page offsets [rows + 1], page numbers, tokens in last pages: int32, host."""
        last = [(length - 1) % PAGE_SIZE + 1 for length in self.lengths]
        return (
            _offsets(self.token_counts),
            _offsets([len(pages) for pages in self.pages]),
            torch.cat(list(self.pages)),
            torch.tensor(last, dtype=torch.int32),
        )


class FlashAttention:
    """FlashInfer's wrappers for one model on one device, and the scratch that they share.

    Belongs to the compute thread.
    """

    def __init__(self, pool: KvPool, kinds: Sequence[AttentionKind], num_heads: int) -> None:
        """`kinds` has one entry per layer."""
        import flashinfer

        self.pool, self.kinds, self.num_heads = pool, tuple(kinds), num_heads
        self._flashinfer: Any = flashinfer
        device = pool.keys.device
        self.workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._mixed = {kind: self.wrapper(self.workspace) for kind in set(kinds)}
        self._copied = torch.cuda.Event()

    @staticmethod
    def supports(dtype: torch.dtype, device: torch.device, head_dim: int) -> bool:
        """Whether FlashInfer is installed and has kernels for this model."""
        return (
            device.type == "cuda"
            and dtype in _DTYPES
            and head_dim in _HEAD_DIMS
            and importlib.util.find_spec("flashinfer") is not None
        )

    @cached_property
    def shape(self) -> dict[str, Any]:
        """What every plan says of heads, pages and dtypes."""
        _, _, page_size, num_kv_heads, _ = self.pool.keys.shape
        dtype = self.pool.keys.dtype
        return {
            "num_qo_heads": self.num_heads,
            "num_kv_heads": num_kv_heads,
            "page_size": page_size,
            "q_data_type": dtype,
            "kv_data_type": dtype,
        }

    def mixed(self, locations: torch.Tensor, rows: RowPages) -> FlashBatch:
        """Plans a step of prefill and decode rows; `locations` as FlashBatch has them."""
        # Planning overwrites page-locked memory, whose copies wait for the step before.
        self._copied.synchronize()
        self.plan(self._mixed, *(part.pin_memory() for part in rows.tensors()))
        self._copied.record()
        return FlashBatch(self.pool, locations, self._mixed, self.kinds)

    def plan(
        self,
        wrappers: dict[AttentionKind, Any],
        tokens: torch.Tensor,
        indptr: torch.Tensor,
        pages: torch.Tensor,
        last: torch.Tensor,
    ) -> None:
        """Plans every wrapper for rows as `RowPages.tensors` gives them."""
        for kind, wrapper in wrappers.items():
            wrapper.plan(
                tokens, indptr, pages, last, head_dim_qk=self.pool.keys.shape[-1], causal=True,
                **_plan_options(kind), **self.shape,
            )  # fmt: skip

    def wrapper(self, workspace: torch.Tensor, **buffers: Any) -> Any:
        """One of FlashInfer's, which is planned and run."""
        made = self._flashinfer.BatchPrefillWithPagedKVCacheWrapper
        return made(workspace, "NHD", backend="fa2", **buffers)


class CapturedFlash:
    """FlashInfer for captured steps: what it reads of a step lies at fixed addresses.

    One set of wrappers serves graphs of every size. Belongs to the compute thread.
    """

    def __init__(
        self, flash: FlashAttention, max_tokens: int, max_rows: int, max_pages: int
    ) -> None:
        """For steps of up to `max_tokens` in `max_rows` rows of up to `max_pages` each."""
        self._flash, self.max_rows = flash, max_rows
        device, counts = flash.pool.keys.device, (max_rows + 1, max_rows + 1, max_rows)
        tokens, indptr, last = (
            torch.zeros(count, dtype=torch.int32, device=device) for count in counts
        )
        num_pages = max(max_rows * max_pages, -(-max_tokens // PAGE_SIZE))  # of `scratch_rows`
        pages = torch.zeros(num_pages, dtype=torch.int32, device=device)
        workspace = torch.zeros(
            _captured_bytes(flash, max_tokens, max_rows), dtype=torch.uint8, device=device
        )
        self._wrappers = {
            kind: flash.wrapper(
                workspace, use_cuda_graph=True, qo_indptr_buf=tokens, paged_kv_indptr_buf=indptr,
                paged_kv_indices_buf=pages, paged_kv_last_page_len_buf=last,
            )
            for kind in set(flash.kinds)
        }  # fmt: skip
        self._copied = torch.cuda.Event()
        self.plan(self.scratch_rows(max_tokens))  # the first plan says how many there can be

    def scratch_rows(self, num_tokens: int) -> RowPages:
        """One row of so many tokens, all on the scratch page."""
        pages = torch.full((-(-num_tokens // PAGE_SIZE),), self._flash.pool.scratch_page)
        return RowPages([num_tokens], [num_tokens], [pages.int()])

    def plan(self, rows: RowPages) -> None:
        """Plans the step that is replayed next."""
        self._copied.synchronize()
        tokens, indptr, pages, last = rows.tensors()
        missing = self.max_rows - len(rows.lengths)  # rows without tokens and without pages
        tokens, indptr = (
            torch.cat((offsets, offsets[-1:].expand(missing))) for offsets in (tokens, indptr)
        )
        last = torch.cat((last, last.new_zeros(missing)))
        # Pages that lie on the host would be waited for.
        pages = to_device(pages, self._flash.pool.keys.device)
        self._flash.plan(
            self._wrappers, tokens.pin_memory(), indptr.pin_memory(), pages, last.pin_memory()
        )
        self._copied.record()

    def batch(self, locations: torch.Tensor) -> FlashBatch:
        """The planned step, as a graph captures it; `locations` as FlashBatch has them."""
        return FlashBatch(self._flash.pool, locations, self._wrappers, self._flash.kinds)


class FlashBatch:
    """A planned step, as the layers read it.

    locations: [num_tokens] int64, where each token's key and value go in the pool: page *
    page_size + offset.
    """

    def __init__(
        self,
        pool: KvPool,
        locations: torch.Tensor,
        wrappers: dict[AttentionKind, Any],
        kinds: Sequence[AttentionKind],
    ) -> None:
        self.pool, self.locations = pool, locations
        self._wrappers = [wrappers[kind] for kind in kinds]

    def attend(self, layer: int, query: torch.Tensor, kind: AttentionKind) -> torch.Tensor:
        """Causal attention [num_tokens, heads, head_dim]; `kind` was planned."""
        paged = (self.pool.keys[layer], self.pool.values[layer])
        return self._wrappers[layer].run(query, paged)  # type: ignore[no-any-return]


def _captured_bytes(flash: FlashAttention, max_tokens: int, max_rows: int) -> int:
    """What a captured step's partial results take at most, as FlashInfer's planner counts them.

    It cuts queries into tiles of up to 128 (token, head of a group) pairs, each row's by itself.
    """
    head_dim, group = flash.pool.keys.shape[-1], flash.num_heads // flash.pool.keys.shape[-2]
    tiles = -(-max_tokens * group // _TILE) + max_rows
    processors = torch.cuda.get_device_properties(flash.pool.keys.device).multi_processor_count
    tiles = max(tiles, 2 * processors // flash.pool.keys.shape[-2])
    return tiles * _TILE * flash.num_heads * (head_dim + 1) * 4 + (1 << 20)


def _plan_options(kind: AttentionKind) -> dict[str, Any]:
    return {
        "sm_scale": kind.scaling,
        "window_left": -1 if kind.window is None else kind.window - 1,
        "logits_soft_cap": kind.softcap,
    }


def _offsets(counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
