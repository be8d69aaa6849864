"""The CUDA step: planned attention, fused layers, LoRA kernels and captured graphs together."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from lorafleet.cache.adapter_files import read_spec
from lorafleet.cache.device_tier import DeviceTier
from lorafleet.cache.host_memory import allocate
from lorafleet.cache.packed_form import plan_form
from lorafleet.cache.packing import pack
from lorafleet.proto.messages import SamplingParams, SequenceStart, StepPlan
from lorafleet.shard.checkpoint import Checkpoint
from lorafleet.shard.flash_attention import FlashAttention
from lorafleet.shard.group import Group
from lorafleet.shard.kv_pool import KvPool
from lorafleet.shard.model import Decoder
from lorafleet.shard.rows import RowTable
from lorafleet.shard.step_graphs import StepGraphs
from lorafleet.shard.streams import StepStream
from lorafleet.shard.worker import FastPath, Worker
from tests.checkpoints import RECIPES, make_adapters, make_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

DTYPE = torch.bfloat16
PROMPT, STEPS = 37, 9


def build(directory: Path, adapters: Path, with_graphs: bool) -> Worker:
    device = torch.device("cuda")
    if not FlashAttention.supports(DTYPE, device, 64):
        pytest.skip("needs FlashInfer")
    decoder = Decoder(AutoConfig.from_pretrained(directory), Group(0, 1, device, ""), DTYPE, device)
    with Checkpoint(directory) as checkpoint:
        decoder.load(checkpoint, lambda done, total: None)
    decoder.optimize(256)
    rows, part = RowTable(8, 256, device), decoder.partition
    pool = KvPool(
        decoder.config.num_hidden_layers, 64, part.local_kv_heads, part.head_dim, DTYPE, device
    )
    tier = DeviceTier(8 << 20, len(RECIPES), decoder.layout, DTYPE, device)
    decoder.attach_adapters(tier)
    offset = 0
    for slot, recipe in enumerate(RECIPES, start=1):
        spec = read_spec(adapters / recipe.name, decoder.layout)
        ranks = {name: module.rank for name, module in spec.modules.items()}
        packed = allocate(plan_form(ranks, decoder.layout, DTYPE.itemsize), DTYPE, pin=True)
        pack(spec, decoder.layout, packed, lambda done: None)
        with torch.inference_mode():
            tier.begin_move(packed, slot, offset)
        offset += packed.nbytes
    attention = FlashAttention(pool, decoder.attention_kinds, part.local_heads)
    graphs = StepGraphs(decoder, rows, pool, attention) if with_graphs else None
    return Worker(decoder, rows, pool, tier, Mock(), True, FastPath(attention, graphs))


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


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "phi3"])
def test_tokens_are_as_likely_as_pefts(family: str, tmp_path: Path) -> None:
    """Every token drawn in bf16 is the best, or nearly, in peft's float32 logits."""
    base = make_checkpoint(
        family, tmp_path / "model", hidden_size=256, head_dim=64, initializer_range=0.05
    )
    make_adapters(base, tmp_path / "adapters")
    slots = list(range(1, 9))
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(3, 250, (len(slots), PROMPT), generator=generator).tolist()
    graphs = build(base, tmp_path / "adapters", with_graphs=True)
    eager = build(base, tmp_path / "adapters", with_graphs=False)
    tokens = run(graphs, slots, prompts)
    assert tokens == run(graphs, slots, prompts)
    alone = [run(graphs, [s], [p])[0] for s, p in zip(slots, prompts, strict=True)]
    launched = run(eager, slots, prompts)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.to("cuda")
    for row, slot in enumerate(slots):
        adapted = PeftModel.from_pretrained(model, tmp_path / "adapters" / RECIPES[slot - 1].name)
        for drawn in (tokens[row], alone[row], launched[row]):
            assert regret(adapted, prompts[row], drawn) < 0.03, (family, slot, drawn)
        model = adapted.unload()


def test_base_rows_and_mixed_batches_of_every_captured_size(tmp_path: Path) -> None:
    base = make_checkpoint("llama", tmp_path / "model", hidden_size=256, head_dim=64)
    make_adapters(base, tmp_path / "adapters")
    worker = build(base, tmp_path / "adapters", with_graphs=True)
    generator = torch.Generator().manual_seed(4)
    prompts = torch.randint(3, 250, (7, PROMPT), generator=generator).tolist()
    slots = [0, 3, 3, 0, 5, 0, 1]
    together = run(worker, slots, prompts)  # 259 tokens: no graph
    for count in (1, 2, 3, 5):
        assert run(worker, slots[:count], prompts[:count])[0] == together[0]
    assert run(worker, [0] * 7, prompts)[0] == together[0]


def test_prompts_in_pieces_beside_decoding_rows_are_as_likely_as_pefts(tmp_path: Path) -> None:
    """Row 0 decodes from step 2 on; row 1's prompt comes in three pieces, row 2's in one."""
    base = make_checkpoint(
        "llama", tmp_path / "model", hidden_size=256, head_dim=64, initializer_range=0.05
    )
    make_adapters(base, tmp_path / "adapters")
    worker = build(base, tmp_path / "adapters", with_graphs=True)
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randint(3, 250, (3, PROMPT), generator=generator).tolist()
    slots = [2, 3, 3]
    # first positions and tokens of the rows that compute, and which of them draw
    steps: list[list[tuple[int, int, int, bool]]] = [
        [(0, 0, PROMPT, True)],
        [(1, 0, 17, False), (0, PROMPT, 1, True)],
        [(1, 17, 19, False), (2, 0, PROMPT, True), (0, PROMPT + 1, 1, True)],
        [(1, 36, 1, True), (2, PROMPT, 1, True), (0, PROMPT + 2, 1, True)],
        [(1, PROMPT, 1, True), (2, PROMPT + 1, 1, True), (0, PROMPT + 3, 1, True)],
    ]
    drawn: dict[int, list[int]] = {0: [], 1: [], 2: []}
    begun: set[int] = set()
    pages = iter(range(64))
    held = dict.fromkeys(drawn, 0)
    for number, step in enumerate(steps, start=1):
        plan = StepPlan(number)
        for row, first, count, draws in step:
            if row not in begun:
                plan.starts.append(SequenceStart(row, prompts[row], PROMPT, SamplingParams()))
                begun.add(row)
            needed = -(-(first + count) // 16)
            plan.num_prefills += first < PROMPT
            plan.rows.append(row)
            plan.first_positions.append(first)
            plan.token_counts.append(count)
            plan.slots.append(slots[row])
            plan.samples.append(draws)
            plan.new_page_counts.append(needed - held[row])
            plan.pages += [next(pages) for _ in range(needed - held[row])]
            held[row] = needed
        tokens = worker.finish(worker.launch(StepStream(), plan)).tokens
        for (row, *_), token in zip([s for s in step if s[3]], tokens, strict=True):
            drawn[row].append(token)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.to("cuda")
    for row, tokens in drawn.items():
        name = RECIPES[slots[row] - 1].name
        adapted = PeftModel.from_pretrained(model, tmp_path / "adapters" / name)
        assert regret(adapted, prompts[row], tokens) < 0.03, (row, tokens)
        model = adapted.unload()


def regret(model: Any, prompt: list[int], drawn: list[int]) -> float:
    """How much likelier than a drawn token the best one is at most, in deviations of the logits."""
    with torch.inference_mode():
        ids = torch.tensor([prompt + drawn], device="cuda")
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
    best = logits.max(dim=-1).values
    lost = best - logits.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
    return float(lost.max() / logits.std())
