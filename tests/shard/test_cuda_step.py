"""The CUDA step: planned attention, fused layers, LoRA kernels and captured graphs together."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorafleet.proto.messages import SamplingParams, SequenceStart, StepPlan
from lorafleet.shard.streams import StepStream
from lorafleet.shard.worker import Worker
from tests.checkpoints import RECIPES, make_adapters, make_checkpoint
from tests.shard.cuda_worker import PROMPT, build, prompts_of, regret, run

SIZES = [2**power for power in range(4, 20) for _ in range(40)]  # of free blocks, in numbers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def folders(path: Path) -> list[Path]:
    """Of the adapters, in the order of the slots."""
    return [path / "adapters" / recipe.name for recipe in RECIPES]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "phi3"])
def test_tokens_are_as_likely_as_pefts(family: str, tmp_path: Path) -> None:
    """Every token drawn in bf16 is the best, or nearly, in peft's float32 logits."""
    base = make_checkpoint(
        family, tmp_path / "model", hidden_size=256, head_dim=64, initializer_range=0.05
    )
    make_adapters(base, tmp_path / "adapters")
    slots = list(range(1, 9))
    prompts = prompts_of(len(slots), seed=3)
    graphs = build(base, folders(tmp_path), with_graphs=True)
    eager = build(base, folders(tmp_path), with_graphs=False)
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


def small_worker(path: Path) -> Worker:
    """Of a Llama with every adapter, by graphs; `down` is wide enough that its shrink has parts."""
    base = make_checkpoint(
        "llama", path / "model", hidden_size=256, head_dim=64, intermediate_size=2048
    )
    make_adapters(base, path / "adapters")
    return build(base, folders(path), with_graphs=True)


def test_base_rows_and_mixed_batches_of_every_captured_size(tmp_path: Path) -> None:
    worker = small_worker(tmp_path)
    prompts = prompts_of(7, seed=4)
    slots = [0, 3, 3, 0, 5, 0, 1]
    together = run(worker, slots, prompts)  # 259 tokens: the form of longer prompts
    for count in (1, 2, 3, 5):
        assert run(worker, slots[:count], prompts[:count])[0] == together[0]
    assert run(worker, [0] * 7, prompts)[0] == together[0]


def test_prompts_in_pieces_beside_decoding_rows_are_as_likely_as_pefts(tmp_path: Path) -> None:
    """Row 0 decodes from step 2 on; row 1's prompt comes in three pieces, row 2's in one."""
    base = make_checkpoint(
        "llama", tmp_path / "model", hidden_size=256, head_dim=64, initializer_range=0.05
    )
    make_adapters(base, tmp_path / "adapters")
    worker = build(base, folders(tmp_path), with_graphs=True)
    prompts = prompts_of(3, seed=5)
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


def test_a_graph_owns_what_it_writes(tmp_path: Path) -> None:
    """Memory that is free once all is captured belongs to others, who may fill it."""
    worker = small_worker(tmp_path)
    prompts = prompts_of(8, seed=7)
    slots = list(range(1, 9))
    fresh = run(worker, slots, prompts)
    gc.collect()
    taken = [torch.full((size,), 77, dtype=torch.int32, device="cuda") for size in SIZES]
    assert run(worker, slots, prompts) == fresh
    assert all(bool((each == 77).all()) for each in taken)
