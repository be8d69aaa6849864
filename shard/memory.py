"""How a rank divides its memory between the KV cache and the adapter arena."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorafleet.kernels.lora.op import LoraBatch
from lorafleet.shard.attention import AttentionBatch, PrefillSpan
from lorafleet.shard.config import PAGE_SIZE, ShardConfig
from lorafleet.shard.errors import UnsupportedModel
from lorafleet.shard.kv_pool import KvPool
from lorafleet.shard.model import Decoder

_CPU_DEFAULT_BYTES = 1 << 30
_ARENA_FRACTION = 0.1  # of a CUDA device; as LoRAX
_TRIAL_ROW_TOKENS = 512
# Captured graphs and attention's scratch, beside the activations that the trial step shows.
_GRAPH_BYTES = 1 << 30


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
        _kv_bytes(config, decoder, arena) // per_page,
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


def _kv_bytes(config: ShardConfig, decoder: Decoder, arena: int) -> int:
    if config.kv_cache_bytes:
        return int(config.kv_cache_bytes)
    if decoder.device.type == "cpu":
        return _CPU_DEFAULT_BYTES
    activations = _measure_activations(config, decoder)
    free, total = torch.cuda.mem_get_info(decoder.device)
    unused = total * (1 - config.cuda_memory_fraction)
    return int(free - unused - arena - activations - _GRAPH_BYTES)


@torch.inference_mode()
def _measure_activations(config: ShardConfig, decoder: Decoder) -> int:
    """Peak bytes of the largest step: a full prefill, and logits for a full batch."""
    device, part = decoder.device, decoder.partition
    count = config.max_batch_prefill_tokens
    per_row = min(count, _TRIAL_ROW_TOKENS)
    num_pages = -(-per_row // PAGE_SIZE)
    pool = KvPool(
        decoder.config.num_hidden_layers, num_pages, part.local_kv_heads, part.head_dim,
        decoder.dtype, device,
    )  # fmt: skip
    positions = torch.arange(count, device=device) % per_row
    pages = torch.arange(num_pages, device=device)
    spans = [
        PrefillSpan(start, min(start + per_row, count), 0, pages)
        for start in range(0, count, per_row)
    ]
    none = torch.empty(0, dtype=torch.int64, device=device)
    paged = AttentionBatch(pool, positions, spans, count, none.unsqueeze(1), none)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    hidden = decoder.forward(torch.zeros_like(positions), positions, paged, LoraBatch.none(device))
    rows = torch.zeros(config.max_batch_size, dtype=torch.int64, device=device)
    decoder.logits(hidden[rows]).softmax(dim=-1)
    peak = torch.cuda.max_memory_allocated(device) - before
    del hidden, paged, pool
    torch.cuda.empty_cache()
    return peak
