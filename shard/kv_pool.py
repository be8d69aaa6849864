"""KvPool: the pages that hold every running sequence's keys and values."""

from __future__ import annotations

import torch

from lorafleet.shard.config import PAGE_SIZE


class KvPool:
    """Keys and values: each [num_layers, num_pages + 1, page_size, kv_heads, head_dim].

    The last page, `scratch_page`, is nobody's: what padding stores goes there.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.scratch_page = num_pages
        shape = (num_layers, num_pages + 1, PAGE_SIZE, num_kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @staticmethod
    def page_bytes(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes one page takes over all layers on one rank."""
        return 2 * num_layers * PAGE_SIZE * num_kv_heads * head_dim * dtype.itemsize

    def write(
        self, layer: int, locations: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Stores this step's keys and values [num_tokens, kv_heads, head_dim].

        `locations` [num_tokens] int64 counts tokens over all pages: page * page_size + offset.
        """
        self.keys[layer].flatten(0, 1).index_copy_(0, locations, keys)
        self.values[layer].flatten(0, 1).index_copy_(0, locations, values)

    def read(self, layer: int, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of `pages` [..., n], joined: [..., n * page_size, kv_heads, head_dim]."""
        return self._gather(self.keys[layer], pages), self._gather(self.values[layer], pages)

    @staticmethod
    def _gather(pool: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        found = pool.index_select(0, pages.flatten())
        return found.view(*pages.shape[:-1], -1, *pool.shape[2:])
