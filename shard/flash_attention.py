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
        # Planning overwrites page-locked memory, whose copies wait for the step before.
        self._copied.synchronize()
        tokens, indptr, pages, last = (part.pin_memory() for part in rows.tensors())
        for kind, wrapper in self._mixed.items():
            wrapper.plan(
                tokens, indptr, pages, last, head_dim_qk=self.pool.keys.shape[-1], causal=True,
                **_plan_options(kind), **self.shape,
            )  # fmt: skip
        self._copied.record()
        return FlashBatch(self.pool, locations, self._mixed, self.kinds)

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

    def attend(self, layer: int, query: torch.Tensor, kind: AttentionKind) -> torch.Tensor:
        """Causal attention [num_tokens, heads, head_dim]; `kind` was planned."""
        paged = (self.pool.keys[layer], self.pool.values[layer])
        return self._wrappers[layer].run(query, paged)  # type: ignore[no-any-return]


def _plan_options(kind: AttentionKind) -> dict[str, Any]:
    return {
        "sm_scale": kind.scaling,
        "window_left": -1 if kind.window is None else kind.window - 1,
        "logits_soft_cap": kind.softcap,
    }


def _offsets(counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
