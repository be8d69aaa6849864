"""Adapters that change the vocabulary: in one batch with others, each row has peft's logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lorafleet.cache.adapter_files import AdapterSpec, read_spec
from lorafleet.cache.base_tables import BaseTables
from lorafleet.cache.device_tier import DeviceTier
from lorafleet.cache.host_memory import allocate
from lorafleet.cache.layout import ModelLayout
from lorafleet.cache.packing import pack, read_tensor
from lorafleet.cache.vocabulary_config import EMBEDDING, HEAD
from lorafleet.proto.messages import SamplingParams, SequenceStart, StepPlan
from lorafleet.shard.batch import build_batch
from lorafleet.shard.checkpoint import Checkpoint
from lorafleet.shard.group import Group
from lorafleet.shard.kv_pool import KvPool
from lorafleet.shard.model import Decoder
from lorafleet.shard.rows import RowTable
from tests.cache.adapter_cases import KnownWeights
from tests.checkpoints import RECIPES, make_adapters, make_checkpoint
from tests.fake_tokenizer import VOCAB_SIZE
from tests.shard.thread_group import on_ranks
from tests.vocabulary_cases import CASES, TOKENS, Case, load_case, make_case

CPU = torch.device("cpu")
PLAIN = Case(RECIPES[1].name)
COUNT = 11  # tokens of a prompt
BUILDING = Lock()  # a model without memory is made by a patch of torch for the whole process


@dataclass(frozen=True)
class Made:
    """A base, the folders of its adapters, and what peft answers to each one's prompt."""

    model: Path
    adapters: Path
    expected: dict[str, torch.Tensor]  # [COUNT, tokens]
    tables: dict[str, torch.Tensor]  # the base's


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    @cache
    def make(family: str) -> Made:
        folder = tmp_path_factory.mktemp(family)
        model = make_checkpoint(family, folder / "model")
        make_adapters(model, folder / "adapters", RECIPES[1:2])
        expected = {}
        for case in (PLAIN, *CASES):
            if case is not PLAIN:
                make_case(case, model, folder / "adapters" / case.name)
            with torch.inference_mode():
                peft = load_case(case, model, folder / "adapters" / case.name)
                expected[case.name] = peft(torch.tensor([prompt(case)])).logits[0]
        base = AutoModelForCausalLM.from_pretrained(model)
        ends = {EMBEDDING: base.get_input_embeddings(), HEAD: base.get_output_embeddings()}
        tables = {name: end.weight.detach() for name, end in ends.items()}
        return Made(model, folder / "adapters", expected, tables)

    return make


def prompt(case: Case) -> list[int]:
    """Tokens of both ranks, some of them trained, some added."""
    added = range(VOCAB_SIZE, case.num_tokens)
    drawn = torch.randint(3, 240, (COUNT,), generator=torch.Generator().manual_seed(2)).tolist()
    ids = [*TOKENS[:2], *list(added)[:3], *drawn]
    return ids[:COUNT]


def logits(
    made: Made, cases: Iterable[Case | None], group: Group, knows_base: bool = False
) -> torch.Tensor:
    """One step of a prompt for each case, None the base: [rows, COUNT, columns].

    `knows_base`: whether adapters' copies of the base's rows are left out.
    """
    cases = list(cases)
    with BUILDING, Checkpoint(made.model) as checkpoint:
        decoder = Decoder(AutoConfig.from_pretrained(made.model), group, torch.float32, CPU)
        decoder.load(checkpoint, lambda done, total: None)
        decoder.optimize(64)
    tier = DeviceTier(64 << 20, len(cases), decoder.layout, torch.float32, CPU)
    decoder.attach_adapters(tier)
    offset, slots = 0, []
    for slot, case in enumerate(cases, start=1):
        slots.append(0 if case is None else slot)
        if case is not None:
            spec = read_spec(made.adapters / case.name, decoder.layout)
            if knows_base:
                spec = without_copies(made, spec, decoder.layout)
            packed = allocate(spec.form(decoder.layout, 4), torch.float32, pin=False)
            pack(spec, decoder.layout, packed, lambda done: None)
            with torch.inference_mode():
                tier.begin_move(packed, slot, offset)
            offset += packed.nbytes
    tier.wait_all()
    prompts = [prompt(case or PLAIN) for case in cases]
    plan = StepPlan(
        1, num_prefills=len(cases), rows=list(range(len(cases))), first_positions=[0] * len(cases),
        token_counts=[COUNT] * len(cases), slots=slots, samples=[True] * len(cases),
        new_page_counts=[1] * len(cases), pages=list(range(len(cases))),
    )  # fmt: skip
    part = decoder.partition
    rows = RowTable(len(cases), 64, CPU)
    pool = KvPool(2, len(cases), part.local_kv_heads, part.head_dim, torch.float32, CPU)
    for row, ids in enumerate(prompts):
        rows.begin(SequenceStart(row, ids, COUNT, SamplingParams()))
    rows.append_pages(plan)
    batch = build_batch(plan, rows, pool, max_rank=16)
    hidden = decoder.forward(batch.token_ids, batch.positions, batch.paged, batch.lora)
    last = decoder.logits(hidden[batch.sample_tokens], batch.sample_segments)
    found = decoder.logits(hidden, batch.lora.segments).view(len(cases), COUNT, -1)
    torch.testing.assert_close(last, found[:, -1], rtol=1e-5, atol=1e-5)
    return found


def without_copies(made: Made, spec: AdapterSpec, layout: ModelLayout) -> AdapterSpec:
    weights = KnownWeights({f"{name}.weight": table for name, table in made.tables.items()})
    base = BaseTables(weights, layout.vocabulary, torch.float32)
    return read_spec(
        spec.directory,
        layout,
        differing=lambda module, table: base.differing(module, read_tensor(spec, table)),
    )


@pytest.mark.parametrize("world", [1, 2])
def test_copies_of_the_base_are_left_out(made: Callable[[str], Made], world: int) -> None:
    mine = made("qwen2")
    names = {"lora-both", "resized", "resized-tokens", "resized-lora", "saved-both", "smaller"}
    cases = [case for case in CASES if case.name in names]
    with torch.inference_mode():
        found = on_ranks(world, lambda group: logits(mine, [*cases, None], group, True))
    assert all(torch.equal(found[0], other) for other in found[1:])
    for case, rows in zip(cases, found[0], strict=False):
        expected = mine.expected[case.name]
        width = expected.shape[1]
        assert (rows[:, :width] - expected).norm() / expected.norm() < 1e-4, case
        assert torch.isneginf(rows[:, width:]).all(), case
    config = AutoConfig.from_pretrained(mine.model)
    layout = Decoder(config, Group(0, 1, CPU, ""), torch.float32, CPU).layout
    for name, is_small in (("lora-both", True), ("resized", True), ("saved-both", False)):
        spec = read_spec(mine.adapters / name, layout)
        small = without_copies(mine, spec, layout).form(layout, 4).nbytes
        assert (small < spec.form(layout, 4).nbytes / 3) == is_small, name


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_every_row_of_a_mixed_batch_has_pefts_logits(
    made: Callable[[str], Made], family: str, world: int
) -> None:
    mine = made(family)
    cases = [None, PLAIN, *CASES, None]
    with torch.inference_mode():
        base = AutoModelForCausalLM.from_pretrained(mine.model)
        plain = base(torch.tensor([prompt(PLAIN)])).logits[0]
        if world == 1:
            found = [logits(mine, cases, Group(0, 1, CPU, ""))]
        else:
            found = on_ranks(world, lambda group: logits(mine, cases, group))
    assert all(torch.equal(found[0], other) for other in found[1:])
    for case, rows in zip(cases, found[0], strict=True):
        expected = plain if case is None else mine.expected[case.name]
        width = expected.shape[1]
        if case is not None and not case.has_all_logits and not base.config.tie_word_embeddings:
            width = VOCAB_SIZE
            expected = expected[:, :width]
        error = (rows[:, :width] - expected).norm() / expected.norm()
        assert error < 1e-4, (case, float(error))
        assert torch.isneginf(rows[:, width:]).all(), case
        assert not torch.isneginf(rows[:, :width]).any(), case


@pytest.mark.parametrize("name", ["smaller", "tokens", "resized", "lora-only-embedding"])
def test_a_batch_of_one_adapter(made: Callable[[str], Made], name: str) -> None:
    mine, case = made("llama"), next(case for case in CASES if case.name == name)
    with torch.inference_mode():
        [rows] = logits(mine, [case], Group(0, 1, CPU, ""))
    expected = mine.expected[name]
    width = expected.shape[1]
    assert (rows[:, :width] - expected).norm() / expected.norm() < 1e-4
    assert torch.isneginf(rows[:, width:]).all()
