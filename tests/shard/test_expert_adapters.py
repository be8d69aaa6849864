"""Adapters of experts and routers: logits of a mixed batch are peft's, whatever form files have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lorafleet.cache.adapter_files import read_spec
from lorafleet.cache.device_tier import DeviceTier
from lorafleet.cache.errors import AdapterUnservable
from lorafleet.cache.host_memory import allocate
from lorafleet.cache.layout import ModelLayout
from lorafleet.cache.packing import PackedAdapter, pack
from lorafleet.proto.messages import SamplingParams, SequenceStart, StepPlan
from lorafleet.shard.batch import build_batch
from lorafleet.shard.checkpoint import Checkpoint
from lorafleet.shard.group import Group
from lorafleet.shard.kv_pool import KvPool
from lorafleet.shard.model import Decoder
from lorafleet.shard.rows import RowTable
from tests.checkpoints import Recipe, make_adapters, make_checkpoint
from tests.expert_adapters import EACH, write_each, write_shared_outer

CPU = torch.device("cpu")
LENGTH, MAX_RANK = 14, 64
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
WEIGHTS, UP = "adapter_model.safetensors", re.compile(r"\.(w3|up_proj)\.")
MLP = ("gate_proj", "up_proj", "down_proj")
FAMILIES = ["mixtral", "qwen3_moe"]

RECIPES = (
    Recipe("both", 4, 8, ("q_proj",), {"target_parameters": BOTH}),
    Recipe(
        "patterns", 8, 3, (),
        {
            "target_parameters": [*BOTH, "gate.weight"],
            "rank_pattern": {r"layers\.1\.mlp\.experts\.gate_up_proj": 2, "gate.weight": 3},
            "alpha_pattern": {"experts.down_proj": 9, "mlp.gate.weight": 5},
            "use_rslora": True,
        },
    ),
    Recipe("gate_up", 3, 5, (), {"target_parameters": ["gate_up_proj"]}),
    Recipe("down", 64, 32, (), {"target_parameters": ["experts.down_proj"]}),
    Recipe("router", 2, 6, (), {"target_parameters": ["mlp.gate.weight"]}),
    Recipe("by modules", 8, 8, ("gate", *MLP)),
    Recipe("a linear's parameter", 2, 4, (), {
        "target_parameters": ["self_attn.q_proj.weight", "gate.weight"],
        "rank_pattern": {"q_proj.weight": 5}, "alpha_pattern": {"q_proj": 50, "q_proj.weight": 7},
    }),
)  # fmt: skip


class Made:
    """A family's checkpoint, its adapters and a loaded decoder."""

    def __init__(self, family: str, folder: Path) -> None:
        self.model = make_checkpoint(family, folder / "model")
        self.adapters = folder / "adapters"
        make_adapters(self.model, self.adapters, RECIPES)
        write_each(self.model, self.adapters / EACH)
        self.decoder = Decoder(self.config, Group(0, 1, CPU, ""), torch.float32, CPU)
        with Checkpoint(self.model) as checkpoint:
            self.decoder.load(checkpoint, lambda done, total: None)
        self.decoder.optimize(64)
        self.tier = DeviceTier(8 << 20, 16, self.decoder.layout, torch.float32, CPU)
        self.decoder.attach_adapters(self.tier)
        self._offset = 0

    @property
    def config(self) -> Any:
        return AutoConfig.from_pretrained(self.model)

    def move(self, name: str, slot: int) -> None:
        packed = packed_of(self.adapters / name, self.decoder.layout)
        self.tier.begin_move(packed, slot, self._offset)
        self._offset += packed.nbytes

    @torch.inference_mode()
    def expected(self, prompt: list[int], name: str | None) -> torch.Tensor:
        model: Any = AutoModelForCausalLM.from_pretrained(self.model)
        if name is not None:
            model = PeftModel.from_pretrained(model, self.adapters / name)
        logits: torch.Tensor = model.eval()(torch.tensor([prompt])).logits[0]
        return logits

    def logits(self, prompts: list[list[int]], slots: list[int]) -> torch.Tensor:
        """[rows, tokens, vocab] of one step over all prompts."""
        count, part = len(prompts), self.decoder.partition
        rows = RowTable(count, 64, CPU)
        pool = KvPool(2, count, part.local_kv_heads, part.head_dim, torch.float32, CPU)
        for row, prompt in enumerate(prompts):
            rows.begin(SequenceStart(row, prompt, LENGTH, SamplingParams()))
        plan = StepPlan(
            1, num_prefills=count, rows=list(range(count)), first_positions=[0] * count,
            token_counts=[LENGTH] * count, slots=slots, samples=[False] * count,
            new_page_counts=[1] * count, pages=list(range(count)),
        )  # fmt: skip
        rows.append_pages(plan)
        self.tier.wait(slots)
        batch = build_batch(plan, rows, pool, MAX_RANK)
        hidden = self.decoder.forward(batch.token_ids, batch.positions, batch.paged, batch.lora)
        return self.decoder.logits(hidden).view(count, LENGTH, -1)


def packed_of(directory: Path, layout: ModelLayout) -> PackedAdapter:
    spec = read_spec(directory, layout)
    packed = allocate(spec.form(layout, 4), torch.float32, pin=False)
    done: list[int] = []
    pack(spec, layout, packed, done.append)
    assert done == sorted(done)
    assert done[-1] <= spec.nbytes
    return packed


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(request.param, tmp_path_factory.mktemp(request.param))


def test_a_mixed_batch_equals_peft(made: Made) -> None:
    names = [*(recipe.name for recipe in RECIPES), EACH, None]
    for slot, name in enumerate(names[:-1], start=1):
        assert name is not None
        made.move(name, slot)
    slots = [*range(1, len(names)), 0]
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(3, 259, (len(names), LENGTH), generator=generator).tolist()
    base = made.logits(prompts, [0] * len(names))
    mixed = made.logits(prompts, slots)
    for row, name in enumerate(names):
        expected = made.expected(prompts[row], name)
        scale = expected.abs().max()
        assert (mixed[row] - expected).abs().max() < 1e-4 * scale, name
        assert name is None or (base[row] - expected).abs().max() > 0.01 * scale, name


def test_an_experts_gate_alone_is_served(made: Made) -> None:
    """peft only has it fused with up: there it equals one whose up changes nothing."""
    write_each(made.model, made.adapters / "zero")
    write_each(made.model, made.adapters / "alone")
    tensors = load_file(made.adapters / "zero" / WEIGHTS)
    ups = {name for name in tensors if ".experts." in name and UP.search(name)}
    zeroed = {
        name: t * 0 if name in ups and ".lora_B." in name else t for name, t in tensors.items()
    }
    save_file(zeroed, made.adapters / "zero" / WEIGHTS)
    alone = {name: tensor for name, tensor in tensors.items() if name not in ups}
    save_file(alone, made.adapters / "alone" / WEIGHTS)
    made.move("alone", 12)
    prompt = list(range(40, 40 + LENGTH))
    expected = made.expected(prompt, "zero")
    found = made.logits([prompt], [12])[0]
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (found - made.logits([prompt], [0])[0]).abs().max() > 0.01 * expected.abs().max()


@pytest.mark.parametrize(("fuse", "slot"), [(False, 13), (True, 14)])
def test_outer_sides_that_all_experts_share(made: Made, fuse: bool, slot: int) -> None:
    """peft reads them only written out for each expert; the answers are the same."""
    single, stacked = (made.adapters / f"{form}-{fuse}" for form in ("single", "stacked"))
    write_shared_outer(made.adapters / EACH, single, stacked, fuse)
    sizes = [(path / WEIGHTS).stat().st_size for path in (stacked, single)]
    assert sizes[0] < 0.8 * sizes[1]
    made.move(stacked.name, slot)
    prompt = list(range(90, 90 + LENGTH))
    expected = made.expected(prompt, single.name)
    found = made.logits([prompt], [slot])[0]
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (found - made.expected(prompt, EACH)).abs().max() > 0.01 * expected.abs().max()


def test_two_ranks_hold_an_adapter_once(made: Made) -> None:
    """The ranks' B(A(x)) over their parts, joined or summed, are the whole layer's."""
    one = made.decoder.layout
    halves = []
    for rank in range(2):
        group = Group(rank, 1, CPU, "")
        group.size = 2
        halves.append(Decoder(made.config, group, torch.float32, torch.device("meta")).layout)
    generator = torch.Generator().manual_seed(4)
    for name in ("patterns", EACH):
        whole = updates(packed_of(made.adapters / name, one), one, generator)
        generator.manual_seed(4)
        parts = []
        for half in halves:
            parts.append(updates(packed_of(made.adapters / name, half), half, generator))
            generator.manual_seed(4)
        for key, expected in whole.items():
            target = halves[0].targets()[key]
            if target.in_local < target.in_features:
                found = parts[0][key] + parts[1][key]
            elif target.out_local < target.out_features:
                found = torch.cat([parts[0][key], parts[1][key]], dim=-1)
            else:
                found = parts[1][key]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def updates(
    packed: PackedAdapter, layout: ModelLayout, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """B(A(x)) of every adapted target, for an x drawn for the whole layer."""
    found = {}
    for site, row in zip(layout.sites, packed.form.rows, strict=True):
        a_offset, _, *pairs = row
        for target, rank, b_offset in zip(site.targets, pairs[::2], pairs[1::2], strict=False):
            x = torch.randn(3, target.in_features, generator=generator)
            start, stop = target.in_range
            if rank:
                a = packed.buffer[a_offset : a_offset + rank * target.in_local]
                b = packed.buffer[b_offset : b_offset + rank * target.out_local]
                a_offset += a.numel()
                found[target.name] = x[:, start:stop] @ a.view(rank, -1).T @ b.view(rank, -1)
    return found


def test_single_linears_have_the_scale_they_were_trained_with(made: Made, tmp_path: Path) -> None:
    """By their own names in the patterns, and as peft scales any linear by rsLoRA.

    peft 0.21 itself, where it fuses them for transformers 5, forgets the patterns and doubles rank
    and alpha, which for rsLoRA is another scale.
    """
    directory = write_each(made.model, tmp_path / "each")
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    leaf = "w2" if made.decoder.architecture.startswith("Mixtral") else "down_proj"
    path.write_text(json.dumps(config | {"use_rslora": True, "alpha_pattern": {leaf: 10}}))
    modules = read_spec(directory, made.decoder.layout).modules
    scales = {name.rpartition(".")[2]: module.scale for name, module in modules.items()}
    assert scales[leaf] == 10 / 2
    assert {scale for name, scale in scales.items() if name != leaf} == {6 / 2}


def refusal(made: Made, directory: Path, name: str, **changes: Any) -> str:
    """What is said to the adapter `name` with these tensors (None: without) and config fields."""
    source = made.adapters / name
    config = json.loads((source / "adapter_config.json").read_text())
    tensors: dict[str, Any] = load_file(source / WEIGHTS)
    for key, value in changes.items():
        (tensors if "lora" in key else config)[key] = value
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config))
    kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / WEIGHTS)
    with pytest.raises(AdapterUnservable) as caught:
        packed_of(directory, made.decoder.layout)
    return str(caught.value)


def test_what_is_not_the_experts_is_refused_by_name(made: Made, tmp_path: Path) -> None:
    layer = "base_model.model.model.layers.1.mlp.experts"
    a, b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
    hidden, experts = 64, made.decoder.partition.num_experts
    in_features = made.decoder.partition.expert_size
    assert "shape [8, 5]; with the config's rank it must be" in refusal(
        made, tmp_path / "a", "both", **{a: torch.zeros(8, 5)}
    )
    assert "lora_B of model.layers.1.mlp.experts.down_proj has shape" in refusal(
        made, tmp_path / "b", "both", **{b: torch.zeros(hidden, 4)}
    )
    assert "has lora_A and no lora_B" in refusal(made, tmp_path / "c", "both", **{b: None})
    assert "not finite" in refusal(
        made, tmp_path / "d", "both",
        **{a: torch.full((4 * experts, in_features), torch.inf)},
    )  # fmt: skip
    assert "target_parameters names 'mlp.experts.gate_up_proj_bias'" in refusal(
        made, tmp_path / "e", "both", target_parameters=[*BOTH, "mlp.experts.gate_up_proj_bias"]
    )
    assert "target_parameters is 'x'" in refusal(
        made, tmp_path / "f", "both", target_parameters="x"
    )
    assert "mlp.experts.base_layer', which is not among" in refusal(
        made, tmp_path / "g", "both", target_parameters=BOTH[1:]
    )
    for shape in ((1, 5, hidden), (experts - 1, 4, hidden), (4, hidden)):
        assert f"lora_A of model.layers.1.mlp.experts.w1 has shape {list(shape)}" in refusal(
            made, tmp_path / f"w1-{len(shape)}-{shape[0]}", "both",
            **{f"{layer}.w1.lora_A.weight": torch.zeros(shape)},
        )  # fmt: skip
    single = made.decoder.layout.moe[0].experts[0][2]
    assert f"{single} twice" in refusal(
        made, tmp_path / "h", "both",
        **{f"base_model.model.{single}.lora_A.weight": torch.zeros(4, in_features)},
    )  # fmt: skip
    assert f"{single} twice" in refusal(
        made, tmp_path / "i", "both",
        **{
            f"base_model.model.{made.decoder.layout.moe[0].path}.experts.lora_B.weight": None,
            f"base_model.model.{single}.lora_B.weight": torch.zeros(hidden, 4),
        },
    )  # fmt: skip


def test_dora_on_experts_is_refused(made: Made, tmp_path: Path) -> None:
    tensors = load_file(made.adapters / EACH / WEIGHTS)
    changes: dict[str, Any] = {name: None for name in tensors if ".experts." not in name}
    for name, b in tensors.items():
        if name not in changes and name.endswith(".lora_B.weight"):
            module = name.removesuffix(".lora_B.weight")
            changes[f"{module}.lora_magnitude_vector"] = torch.ones(b.shape[0])
    said = refusal(made, tmp_path / "dora", EACH, use_dora=True, **changes)
    assert "lora_magnitude_vector, which is not served on experts" in said
    said = refusal(made, tmp_path / "fused", "both", use_dora=True)
    assert "use_dora is true and" in said
