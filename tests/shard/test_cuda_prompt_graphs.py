"""Captured steps with long prompts, beside the same steps launched kernel by kernel."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafleet.proto.messages import SamplingParams, SequenceStart, StepPlan, StepResult
from lorafleet.shard.streams import StepStream
from lorafleet.shard.worker import Worker
from tests.checkpoints import RECIPES, make_adapters, make_checkpoint
from tests.fake_tokenizer import VOCAB_SIZE
from tests.shard.cuda_worker import build

ROWS, MAX_TOKENS = 8, 1024
PAGES = 16  # of each row, which has pages of its own
WHOLE = SamplingParams(num_top_logprobs=VOCAB_SIZE)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama and every adapter; `down` is wide enough that its shrink has parts."""
    path = tmp_path_factory.mktemp("prompts")
    base = make_checkpoint(
        "llama", path / "model", hidden_size=256, head_dim=64, intermediate_size=2048,
        initializer_range=0.05,
    )  # fmt: skip
    make_adapters(base, path / "adapters")
    return path


def adapters(folder: Path) -> list[Path]:
    """In the order of the slots."""
    return [folder / "adapters" / recipe.name for recipe in RECIPES]


def prompts_step(random: Random, rows: list[int], slots: list[int], total: int) -> StepPlan:
    """`total` tokens, a new sequence in each row."""
    cuts = sorted(random.sample(range(1, total), len(rows) - 1))
    counts = [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
    while max(counts) > 16 * PAGES - 8:  # the longest goes on in the shortest
        longest, shortest = counts.index(max(counts)), counts.index(min(counts))
        moved = (counts[longest] - counts[shortest]) // 2
        counts[longest], counts[shortest] = counts[longest] - moved, counts[shortest] + moved
    plan = StepPlan(0, num_prefills=len(rows))
    for row, slot, count in zip(rows, slots, counts, strict=True):
        ids = [random.randrange(3, VOCAB_SIZE) for _ in range(count)]
        plan.starts.append(SequenceStart(row, ids, count, WHOLE))
        add_row(plan, row, slot, 0, count)
    return plan


def add_row(plan: StepPlan, row: int, slot: int, first: int, count: int) -> None:
    """Adds `count` tokens from position `first` on, with the pages that they need."""
    held, needed = -(-first // 16), -(-(first + count) // 16)
    plan.rows.append(row)
    plan.first_positions.append(first)
    plan.token_counts.append(count)
    plan.slots.append(slot)
    plan.samples.append(True)
    plan.new_page_counts.append(needed - held)
    plan.pages += range(row * PAGES + held, row * PAGES + needed)


def decode_step(after: StepPlan) -> StepPlan:
    """One token more for each row of a step."""
    plan = StepPlan(0)
    columns = zip(after.rows, after.slots, after.first_positions, after.token_counts, strict=True)
    for row, slot, first, count in columns:
        add_row(plan, row, slot, first + count, 1)
    return plan


def result_of(worker: Worker, plan: StepPlan) -> StepResult:
    return worker.finish(worker.launch(StepStream(), plan))


def logprobs(result: StepResult, rows: int) -> torch.Tensor:
    """[rows, vocabulary], in the order of the ids."""
    ids = torch.tensor(result.top_ids).view(rows, VOCAB_SIZE)
    found = torch.tensor(result.top_logprobs).view(rows, VOCAB_SIZE)
    return torch.empty_like(found).scatter_(1, ids, found)


def random_slots(random: Random, count: int) -> list[int]:
    """Base rows, adapters by themselves, and neighbours that share one."""
    slots = [random.randint(0, len(RECIPES)) for _ in range(count)]
    if random.random() < 0.5:
        slots.sort()
    return slots


@pytest.mark.parametrize("seed", range(6))
def test_prompts_in_graphs_are_as_likely_as_launched(folder: Path, seed: int) -> None:
    """Twenty steps of 257 to 1,024 tokens, each followed by one of decodes that reads its keys."""
    random = Random(seed)
    graphs = build(folder / "model", adapters(folder), with_graphs=True)
    launched = build(folder / "model", adapters(folder), with_graphs=False)
    for _ in range(20):
        rows = random.sample(range(ROWS), random.randint(5, ROWS))
        total = random.choice([257, 300, 384, 511, 512, 513, 700, MAX_TOKENS])
        prompts = prompts_step(random, rows, random_slots(random, len(rows)), total)
        same = list(range(len(rows)))  # rows that drew the same tokens so far
        for plan in (prompts, decode_step(prompts)):
            results = [result_of(worker, plan) for worker in (graphs, launched)]
            found, expected = (logprobs(result, len(rows))[same] for result in results)
            assert torch.isfinite(found).all(), (total, plan.slots)
            off = (found - expected).abs().max() / expected.std()
            assert off < 0.1, (total, plan.slots, float(off))
            same = [row for row in same if results[0].tokens[row] == results[1].tokens[row]]
        assert len(same) >= len(rows) // 2


def test_shrinks_beside_their_products_change_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps whose shrinks have a stream of their own, beside the same ones on one stream."""
    random = Random(17)
    worker = build(folder / "model", adapters(folder), with_graphs=False)
    for _ in range(10):
        rows = list(range(ROWS))
        plan = prompts_step(random, rows, random_slots(random, ROWS), 900)
        results = []
        for least_tokens in (1 << 30, 1, 1):
            monkeypatch.setattr("lorafleet.kernels.lora.op._MIN_TOKENS_BESIDE", least_tokens)
            results.append(logprobs(result_of(worker, plan), ROWS))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("total", [100, 257, 511, MAX_TOKENS])
def test_what_is_not_finite_stays_in_its_rows(folder: Path, total: int, tmp_path: Path) -> None:
    """An adapter that overflows harms no row of its step, nor any step after it."""
    shutil.copytree(folder / "adapters" / "r16-all", tmp_path / "wild")
    weights = load_file(tmp_path / "wild" / "adapter_model.safetensors")
    for name in weights:
        if "lora_B" in name:
            weights[name] *= 1e35
    save_file(weights, tmp_path / "wild" / "adapter_model.safetensors")
    random, wild = Random(total), len(RECIPES) + 1
    rows, slots = list(range(ROWS)), [0, 4, wild, 4, 5, wild, 0, 3]
    tame = [i for i in rows if slots[i] != wild]
    worker = build(folder / "model", [*adapters(folder), tmp_path / "wild"], with_graphs=True)
    plan = prompts_step(random, rows, [slot % wild for slot in slots], total)
    steps = (plan, decode_step(plan))
    before = [logprobs(result_of(worker, step), ROWS) for step in steps]
    for step in steps:
        step.slots[:] = slots
    beside = [logprobs(result_of(worker, step), ROWS) for step in steps]
    for step in steps:
        step.slots[:] = [slot % wild for slot in slots]
    after = [logprobs(result_of(worker, step), ROWS) for step in steps]
    for first, second, third in zip(before, beside, after, strict=True):
        assert not torch.equal(first, second)
        assert torch.equal(first[tame], second[tame])
        assert torch.equal(first, third)
