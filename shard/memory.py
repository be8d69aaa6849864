"""How a rank divides its memory between the KV cache and the adapter arena."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorafleet.shard.config import PAGE_SIZE, ShardConfig
from lorafleet.shard.errors import UnsupportedModel
from lorafleet.shard.kv_pool import KvPool
from lorafleet.shard.model import Decoder

_CPU_DEFAULT_BYTES = 1 << 30
_ARENA_FRACTION = 0.1  # of a CUDA device; as LoRAX


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """KV pages and adapter bytes of one rank."""

    num_pages: int
    arena_bytes: int


def plan_memory(config: ShardConfig, decoder: Decoder, max_len: int) -> MemoryPlan:
    """Sizes both from flags, or from what the loaded weights leave. Raises UnsupportedModel."""
    arena = int(config.adapter_device_bytes) or _default_arena(decoder.device)
    per_page = KvPool.page_bytes(
        decoder.config.num_hidden_layers, decoder.partition.local_kv_heads,
        decoder.partition.head_dim, decoder.dtype,
    )  # fmt: skip
    pages = config.kv_pages or min(
        _kv_bytes(config, decoder.device, arena) // per_page,
        config.max_batch_size * -(-max_len // PAGE_SIZE),  # more could never be used
    )
    if pages < 1:
        raise UnsupportedModel(
            f"no memory is left for the KV cache: "
            f"a page of {PAGE_SIZE} tokens takes {per_page} bytes"
        )
    return MemoryPlan(pages, arena)


def _default_arena(device: torch.device) -> int:
    if device.type == "cpu":
        return _CPU_DEFAULT_BYTES
    return int(torch.cuda.mem_get_info(device)[1] * _ARENA_FRACTION)


def _kv_bytes(config: ShardConfig, device: torch.device, arena: int) -> int:
    if config.kv_cache_bytes:
        return int(config.kv_cache_bytes)
    if device.type == "cpu":
        return _CPU_DEFAULT_BYTES
    free, total = torch.cuda.mem_get_info(device)
    return int(free - total * (1 - config.cuda_memory_fraction) - arena)
