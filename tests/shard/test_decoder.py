"""Decoder: one rank's logits are transformers' logits, however the tokens are cut into steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from lorafleet.kernels.lora.op import Pending
from lorafleet.proto.messages import SamplingParams, SequenceStart, StepPlan
from lorafleet.shard.batch import build_batch
from lorafleet.shard.checkpoint import Checkpoint
from lorafleet.shard.errors import BadCheckpoint, UnsupportedModel
from lorafleet.shard.group import Group
from lorafleet.shard.kv_pool import KvPool
from lorafleet.shard.layers import RowSite
from lorafleet.shard.model import SUPPORTED, Decoder
from lorafleet.shard.rows import RowTable
from tests.checkpoints import FAMILIES, make_checkpoint

CPU = torch.device("cpu")
TOKENS = torch.randint(3, 259, (45,), generator=torch.Generator().manual_seed(1)).tolist()


def load(directory: Path, fused: bool = True, rank: int = 0, size: int = 1) -> Decoder:
    config = AutoConfig.from_pretrained(directory)
    group = Group(rank, 1, CPU, "")
    group.size = size  # the shapes and the loading need no second process
    decoder = Decoder(config, group, torch.float32, CPU)
    with Checkpoint(directory) as checkpoint:
        decoder.load(checkpoint, lambda done, total: None)
    if fused:
        decoder.optimize(64)
    return decoder


def logits_in_steps(decoder: Decoder, chunks: list[int]) -> torch.Tensor:
    """Logits [tokens, vocab] of TOKENS computed `chunks` tokens at a time; pages in odd order."""
    part = decoder.partition
    rows = RowTable(4, 64, CPU)
    layers = decoder.config.num_hidden_layers
    pool = KvPool(layers, 8, part.local_kv_heads, part.head_dim, torch.float32, CPU)
    rows.begin(SequenceStart(2, TOKENS, len(TOKENS), SamplingParams()))
    pages, found, first = [6, 1, 4], [], 0
    for step, count in enumerate(chunks, start=1):
        held, needed = -(-first // 16), -(-(first + count) // 16)
        plan = StepPlan(
            step,
            num_prefills=int(count > 1),
            rows=[2],
            first_positions=[first],
            token_counts=[count],
            slots=[0],
            samples=[False],
            new_page_counts=[needed - held],
            pages=pages[held:needed],
        )
        rows.append_pages(plan)
        batch = build_batch(plan, rows, pool, max_rank=0)
        hidden = decoder.forward(batch.token_ids, batch.positions, batch.paged, batch.lora)
        found.append(decoder.logits(hidden))
        first += count
    return torch.cat(found)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name: str, fused: bool, tmp_path: Path) -> None:
    directory = make_checkpoint(name, tmp_path)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
        expected = model(torch.tensor([TOKENS])).logits[0]
    decoder = load(directory, fused)
    for chunks in ([45], [7] * 6 + [3], [30] + [1] * 15):
        torch.testing.assert_close(logits_in_steps(decoder, chunks), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_last_layer_does_only_what_is_read(
    name: str, fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiplied: list[int] = []  # rows, by each of o and down
    product = RowSite.product

    def counted(site: RowSite, rows: torch.Tensor) -> tuple[torch.Tensor, Pending | None]:
        multiplied.append(len(rows))
        return product(site, rows)

    monkeypatch.setattr(RowSite, "product", counted)
    decoder = load(make_checkpoint(name, tmp_path), fused)
    part = decoder.partition
    layers = decoder.config.num_hidden_layers
    found, stored = [], []
    for samples in ([False, False], [True, False], [True, True], None):
        rows = RowTable(4, 64, CPU)
        pool = KvPool(layers, 8, part.local_kv_heads, part.head_dim, torch.float32, CPU)
        for row in (0, 3):
            rows.begin(SequenceStart(row, TOKENS[row:], len(TOKENS) - row, SamplingParams()))
        plan = StepPlan(
            1, num_prefills=2, rows=[0, 3], first_positions=[0, 0], token_counts=[20, 7],
            slots=[0, 0], samples=samples or [True, True], new_page_counts=[2, 1],
            pages=[3, 1, 6],
        )  # fmt: skip
        rows.append_pages(plan)
        batch = build_batch(plan, rows, pool, max_rank=0)
        last = batch.last_tokens() if samples else None
        multiplied.clear()
        step = batch.token_ids, batch.positions, batch.paged, batch.lora
        found.append(decoder.forward(*step, last))
        if fused and name == "llama":  # others compute all and pick
            read = 27 if samples is None else sum(samples)
            assert multiplied == [27, 27] * (layers - 1) + [read, read] * (read > 0)
        stored.append(torch.stack([*pool.keys, *pool.values]))
    none, one, both, every = found
    assert none.shape == (0, every.shape[1])
    torch.testing.assert_close(one, every[[19]])
    torch.testing.assert_close(both, every[[19, 26]])
    assert all(torch.equal(each, stored[-1]) for each in stored)


def test_a_checkpoint_in_several_files(tmp_path: Path) -> None:
    whole = load(make_checkpoint("llama", tmp_path / "one"))
    directory = make_checkpoint("llama", tmp_path / "many", shard_size="100KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    many = load(directory)
    assert torch.equal(logits_in_steps(whole, [45]), logits_in_steps(many, [45]))


def test_a_rank_holds_its_part_only(tmp_path: Path) -> None:
    directory = make_checkpoint("llama", tmp_path)
    decoder = load(directory, fused=False, size=2)
    whole = load(directory)
    half = sum(site.weight.numel() for site in decoder.sites)
    assert half * 2 == sum(site.weight.numel() for site in whole.sites)
    assert decoder.head.weight.shape[0] == 130
    assert not any(p.is_meta for site in decoder.sites for p in site.parameters())


def test_an_unsupported_architecture_is_named_with_the_supported_ones() -> None:
    from transformers import GPT2Config

    config = GPT2Config(architectures=["GPT2LMHeadModel"])
    with pytest.raises(UnsupportedModel) as caught:
        Decoder(config, Group(0, 1, CPU, ""), torch.float32, CPU)
    assert "GPT2LMHeadModel" in str(caught.value)
    assert all(name in str(caught.value) for name in SUPPORTED)


def test_a_missing_tensor_and_a_wrong_shape_are_named(tmp_path: Path) -> None:
    directory = make_checkpoint("llama", tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(BadCheckpoint, match=r"no tensor 'model\.layers\.2"):
        load(directory)
    (directory / "config.json").write_text(json.dumps(config | {"hidden_size": 128}))
    with pytest.raises(BadCheckpoint, match=r"embed_tokens\.weight: the configuration asks for"):
        load(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match=r"neither model\.safetensors nor"):
        load(directory)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_in_one_tensor_are_those_in_many(name: str, tmp_path: Path) -> None:
    many = make_checkpoint(name, tmp_path / "many")
    fused = tmp_path / "fused"
    model = AutoModelForCausalLM.from_pretrained(many)
    model.save_pretrained(fused, save_original_format=False)
    assert not any("experts.0" in key for key in load_file(fused / "model.safetensors"))
    whole = logits_in_steps(load(many), [45])
    assert torch.equal(logits_in_steps(load(fused), [45]), whole)
    for rank in range(2):
        of_many, of_fused = (load(folder, False, rank, size=2).sites for folder in (many, fused))
        for one, other in zip(of_many, of_fused, strict=True):
            assert torch.equal(one.weight, other.weight), one.layout.name
