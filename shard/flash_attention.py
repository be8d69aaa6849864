"""Attention by FlashInfer over the paged KV pool: planned once a step, run once a layer.

One kernel family serves both kinds of step: `mixed` takes prefill rows and decode rows in one
launch, `DecodePlan` takes one token a row at addresses that a captured CUDA graph can keep.
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

# Its scratch for partial results of long rows, as its documentation recommends.
_WORKSPACE_BYTES = 128 << 20
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
        self._mixed = {kind: self._prefill_wrapper() for kind in set(kinds)}
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
        self.wait_for_copies()
        tokens, indptr, pages, last = (part.pin_memory() for part in rows.tensors())
        for kind, wrapper in self._mixed.items():
            wrapper.plan(
                tokens, indptr, pages, last, head_dim_qk=self.pool.keys.shape[-1], causal=True,
                **_plan_options(kind), **self.shape,
            )  # fmt: skip
        self.copies_issued()
        return FlashBatch(self.pool, locations, self._mixed, self.kinds)

    def decode_wrapper(self, buffers: dict[str, torch.Tensor]) -> Any:
        """A wrapper over fixed buffers; see DecodePlan."""
        return self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self.workspace, "NHD", use_cuda_graph=True, use_tensor_cores=True, backend="fa2",
            **buffers,
        )  # fmt: skip

    def wait_for_copies(self) -> None:
        """Waits until the last plan has left its page-locked staging memory.

        Planning overwrites that memory, and its copies wait on the device for the step before.
        """
        self._copied.synchronize()

    def copies_issued(self) -> None:
        """Marks the point that `wait_for_copies` waits for."""
        self._copied.record()

    def _prefill_wrapper(self) -> Any:
        wrapper = self._flashinfer.BatchPrefillWithPagedKVCacheWrapper
        return wrapper(self.workspace, "NHD", backend="fa2")


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

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Causal attention [num_tokens, heads, head_dim]; scaling and the rest were planned."""
        paged = (self.pool.keys[layer], self.pool.values[layer])
        return self._wrappers[layer].run(query, paged)  # type: ignore[no-any-return]


class DecodePlan:
    """A decode step's attention at fixed addresses: `batch` is captured, `plan` goes before it."""

    def __init__(self, attention: FlashAttention, num_rows: int, max_pages: int) -> None:
        """Buffers for `num_rows` rows that hold `max_pages` pages between them at most."""
        device = attention.pool.keys.device

        def buffer(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        self._attention, self._pages = attention, buffer(max_pages)
        self._wrappers = {
            kind: attention.decode_wrapper(
                {
                    "paged_kv_indptr_buffer": buffer(num_rows + 1),
                    "paged_kv_indices_buffer": self._pages,
                    "paged_kv_last_page_len_buffer": buffer(num_rows),
                }
            )
            for kind in set(attention.kinds)
        }

    def plan(self, rows: RowPages) -> None:
        """Queues the copies that make the captured launches work on these rows."""
        self._attention.wait_for_copies()
        _, indptr, pages, last = (part.pin_memory() for part in rows.tensors())
        # Copied here: FlashInfer would wait for the device before it copies from the host.
        pages = self._pages[: len(pages)].copy_(pages, non_blocking=True)
        for kind, wrapper in self._wrappers.items():
            wrapper.plan(
                indptr, pages, last, head_dim=self._attention.pool.keys.shape[-1],
                **_plan_options(kind), **self._attention.shape,
            )  # fmt: skip
        self._attention.copies_issued()

    def batch(self, locations: torch.Tensor) -> FlashBatch:
        """The step as the layers read it, `locations` at an address that stays."""
        attention = self._attention
        return FlashBatch(attention.pool, locations, self._wrappers, attention.kinds)


def _plan_options(kind: AttentionKind) -> dict[str, Any]:
    return {
        "sm_scale": kind.scaling,
        "window_left": -1 if kind.window is None else kind.window - 1,
        "logits_soft_cap": kind.softcap,
    }


def _offsets(counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
