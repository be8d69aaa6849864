"""From a ShardConfig to a loaded rank: model, caches, adapter tiers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lorafleet.cache.device_tier import ALIGNMENT, DeviceTier
from lorafleet.cache.sources.local import root_paths
from lorafleet.cache.store import AdapterStore
from lorafleet.kernels.build import KernelBuildError, NvccMissing, library
from lorafleet.proto.messages import ShardInfo
from lorafleet.shard.base_weights import CheckpointWeights
from lorafleet.shard.checkpoint import Checkpoint, locate
from lorafleet.shard.config import PAGE_SIZE, ShardConfig
from lorafleet.shard.errors import UnsupportedModel
from lorafleet.shard.flash_attention import FlashAttention
from lorafleet.shard.group import Group
from lorafleet.shard.kv_pool import KvPool
from lorafleet.shard.memory import MemoryPlan, plan_memory
from lorafleet.shard.model import Decoder
from lorafleet.shard.model_config import model_config
from lorafleet.shard.rows import RowTable
from lorafleet.shard.step_graphs import StepGraphs
from lorafleet.shard.tokenizer import eos_token_ids, tokenizer_config_json, tokenizer_json
from lorafleet.shard.worker import FastPath, Worker

log = logging.getLogger(__name__)

_DEFAULT_MAX_LEN = 4096  # where the model allows it; as LoRAX


@dataclass(frozen=True, slots=True)
class LoadedShard:
    """A rank that is ready to run plans."""

    worker: Worker
    store: AdapterStore
    info: ShardInfo


def load_shard(
    config: ShardConfig, group: Group, device: torch.device, progress: Callable[[int, int], None]
) -> LoadedShard:
    """Loads this rank. Raises UnsupportedModel or BadCheckpoint, for the operator to read."""
    directory = locate(config.model_id, config.revision)
    base_config = model_config(config.model_id, directory)
    dtype = _dtype(config.dtype, base_config)
    max_len = _max_len(config.max_total_tokens, base_config)
    _check_kernels(dtype, device)
    decoder = Decoder(base_config, group, dtype, device)
    base = None if config.load_format == "dummy" else CheckpointWeights(directory, dtype)
    if base is None:
        decoder.randomize(seed=0)
    else:
        with Checkpoint(directory) as checkpoint:
            decoder.load(checkpoint, progress)
    decoder.optimize(max_len)
    memory = plan_memory(config, decoder, max_len)
    adapters = DeviceTier(
        memory.arena_bytes, config.max_active_adapters, decoder.layout, dtype, device
    )
    decoder.attach_adapters(adapters)
    info = _describe(config, decoder, memory, max_len, directory)
    store = AdapterStore(
        config, decoder.layout, dtype, device, base=base, base_tokenizer=info.tokenizer_json
    )
    rows, pool = RowTable(config.max_batch_size, max_len, device), _kv_pool(decoder, memory)
    fast = _fast_path(config, decoder, rows, pool)
    worker = Worker(decoder, rows, pool, adapters, store, answers=group.rank == 0, fast=fast)
    return LoadedShard(worker, store, info)


def pick_device(name: str, rank: int) -> torch.device:
    """The device of a rank; "auto" takes CUDA when there is one. Raises UnsupportedModel."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UnsupportedModel("--device cuda: this machine has no usable CUDA device")
    if name == "cpu" or not available:
        return torch.device("cpu")
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _check_kernels(dtype: torch.dtype, device: torch.device) -> None:
    """Builds or finds the CUDA kernels before anything is loaded. Raises UnsupportedModel."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        try:
            library()
        except (KernelBuildError, NvccMissing) as error:
            raise UnsupportedModel(f"CUDA in {dtype} needs the kernels: {error}") from error


def _fast_path(config: ShardConfig, decoder: Decoder, rows: RowTable, pool: KvPool) -> FastPath:
    """FlashInfer and captured graphs where the device, the dtype and the model have them."""
    part = decoder.partition
    attention, graphs = None, None
    if FlashAttention.supports(decoder.dtype, decoder.device, part.head_dim):
        attention = FlashAttention(pool, decoder.attention_kinds, part.local_heads)
    elif decoder.device.type == "cuda":
        log.warning("prompts attend in plain torch: FlashInfer is missing or has no kernels for it")
    if config.cuda_graph_tokens and StepGraphs.supports(decoder):
        graphs = StepGraphs(decoder, rows, pool, attention, config.cuda_graph_tokens)
        graphs.capture_all()
    return FastPath(attention, graphs)


def _kv_pool(decoder: Decoder, memory: MemoryPlan) -> KvPool:
    part = decoder.partition
    return KvPool(
        decoder.config.num_hidden_layers, memory.num_pages, part.local_kv_heads, part.head_dim,
        decoder.dtype, decoder.device,
    )  # fmt: skip


def _dtype(name: str, base_config: object) -> torch.dtype:
    if name == "auto":
        found = getattr(base_config, "dtype", None)
        return found if isinstance(found, torch.dtype) else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _max_len(asked: int, base_config: object) -> int:
    limit = int(getattr(base_config, "max_position_embeddings", _DEFAULT_MAX_LEN))
    if asked > limit:
        raise UnsupportedModel(f"--max-total-tokens {asked} exceeds the model's {limit} positions")
    return asked or min(limit, _DEFAULT_MAX_LEN)


def _describe(
    config: ShardConfig, decoder: Decoder, memory: MemoryPlan, max_len: int, directory: Path
) -> ShardInfo:
    return ShardInfo(
        model_id=config.model_id,
        architecture=decoder.architecture,
        dtype=str(decoder.dtype).removeprefix("torch."),
        device=decoder.device.type,
        rank=config.rank,
        world_size=config.num_shard,
        vocab_size=decoder.partition.vocab_size,
        max_model_len=max_len,
        page_size=PAGE_SIZE,
        num_pages=memory.num_pages,
        max_rows=config.max_batch_size,
        max_step_tokens=config.max_batch_prefill_tokens,
        num_slots=config.max_active_adapters,
        arena_bytes=memory.arena_bytes,
        host_bytes=int(config.adapter_host_bytes),
        disk_bytes=int(config.adapter_disk_bytes),
        eos_token_ids=eos_token_ids(directory, decoder.config),
        tokenizer_json=tokenizer_json(directory),
        tokenizer_config_json=tokenizer_config_json(directory),
        model_revision=getattr(decoder.config, "_commit_hash", None) or "",
        arena_alignment=ALIGNMENT,
        adapter_roots=root_paths(config.adapter_root),
    )
