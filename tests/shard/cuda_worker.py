"""A worker on a CUDA device over a small checkpoint and its adapters, and what peft says of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoConfig

from lorafleet.cache.adapter_files import read_spec
from lorafleet.cache.device_tier import DeviceTier
from lorafleet.cache.host_memory import allocate
from lorafleet.cache.packing import pack
from lorafleet.proto.messages import SamplingParams, SequenceStart, StepPlan
from lorafleet.shard.base_weights import CheckpointWeights
from lorafleet.shard.checkpoint import Checkpoint
from lorafleet.shard.flash_attention import FlashAttention
from lorafleet.shard.group import Group
from lorafleet.shard.kv_pool import KvPool
from lorafleet.shard.model import Decoder
from lorafleet.shard.rows import RowTable
from lorafleet.shard.step_graphs import StepGraphs
from lorafleet.shard.streams import StepStream
from lorafleet.shard.worker import FastPath, Worker

DTYPE = torch.bfloat16
PROMPT, STEPS = 37, 9


def build(directory: Path, adapters: Sequence[Path], with_graphs: bool) -> Worker:
    """Adapter i has slot i + 1."""
    device = torch.device("cuda")
    if not FlashAttention.supports(DTYPE, device, 64):
        pytest.skip("needs FlashInfer")
    decoder = Decoder(AutoConfig.from_pretrained(directory), Group(0, 1, device, ""), DTYPE, device)
    with Checkpoint(directory) as checkpoint:
        decoder.load(checkpoint, lambda done, total: None)
    decoder.optimize(256)
    rows, part = RowTable(8, 256, device), decoder.partition
    pool = KvPool(
        decoder.config.num_hidden_layers, rows.max_rows * rows.page_table.shape[1],
        part.local_kv_heads, part.head_dim, DTYPE, device,
    )  # fmt: skip
    tier = DeviceTier(64 << 20, len(adapters), decoder.layout, DTYPE, device)
    decoder.attach_adapters(tier)
    base, offset = CheckpointWeights(directory, DTYPE), 0
    for slot, adapter in enumerate(adapters, start=1):
        spec = read_spec(adapter, decoder.layout, base)
        packed = allocate(spec.form(decoder.layout, DTYPE.itemsize), DTYPE, pin=True)
        pack(spec, decoder.layout, packed, lambda done: None)
        with torch.inference_mode():
            tier.begin_move(packed, slot, offset)
        offset += packed.nbytes
    attention = FlashAttention(pool, decoder.attention_kinds, part.local_heads)
    graphs = None
    if with_graphs and StepGraphs.supports(decoder):
        graphs = StepGraphs(decoder, rows, pool, attention, 1024)
    return Worker(decoder, rows, pool, tier, Mock(), True, FastPath(attention, graphs))


def prompts_of(count: int, seed: int) -> list[list[int]]:
    """Random prompts of PROMPT tokens."""
    generator = torch.Generator().manual_seed(seed)
    found: list[list[int]] = torch.randint(3, 250, (count, PROMPT), generator=generator).tolist()
    return found


def run(worker: Worker, slots: list[int], prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of one row per slot, one step queued behind the other."""
    count = len(slots)
    plan = StepPlan(
        1,
        starts=[SequenceStart(i, p, PROMPT, SamplingParams()) for i, p in enumerate(prompts)],
        num_prefills=count, rows=list(range(count)), first_positions=[0] * count,
        token_counts=[PROMPT] * count, slots=slots, samples=[True] * count,
        new_page_counts=[3] * count, pages=list(range(3 * count)),
    )  # fmt: skip
    found, launched = [], [worker.launch(StepStream(), plan)]
    for step in range(STEPS):
        decode = StepPlan(
            step + 2, rows=list(range(count)), first_positions=[PROMPT + step] * count,
            token_counts=[1] * count, slots=slots, samples=[True] * count,
            new_page_counts=[0] * count,
        )  # fmt: skip
        launched.append(worker.launch(StepStream(), decode))
        found.append(worker.finish(launched.pop(0)).tokens)
    found.append(worker.finish(launched.pop(0)).tokens)
    return [list(row) for row in zip(*found, strict=True)]


def regret(model: Any, prompt: list[int], drawn: list[int]) -> float:
    """How much likelier than a drawn token the best one is at most, in deviations of the logits."""
    with torch.inference_mode():
        ids = torch.tensor([prompt + drawn], device="cuda")
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
    best = logits.max(dim=-1).values
    lost = best - logits.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
    return float(lost.max() / logits.std())
