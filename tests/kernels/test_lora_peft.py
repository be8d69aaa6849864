"""Adapters as peft trains and saves them: what lora_add_ adds is what peft adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorafleet.cache.adapter_files import read_spec
from lorafleet.cache.device_tier import DeviceTier
from lorafleet.cache.host_memory import allocate
from lorafleet.cache.packing import PackedAdapter, pack
from lorafleet.kernels.lora.op import LoraBatch, lora_add_
from tests.cache.adapter_cases import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    LAYERS,
    tiny_layout,
)

# peft 0.21 asks transformers 5 under a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

ADAPTERS: list[dict[str, Any]] = [
    {"r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]},
    {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
    {"r": 8, "lora_alpha": 4, "target_modules": "all-linear"},
    {"r": 16, "lora_alpha": 16, "use_rslora": True, "target_modules": [*ATTENTION, "down_proj"]},
    {"r": 64, "lora_alpha": 10, "target_modules": r".*\.mlp\.(gate|up)_proj"},
    {"r": 8, "lora_alpha": 8, "target_modules": ["k_proj"], "layers_to_transform": [1]},
    {
        "r": 8,
        "lora_alpha": 12,
        "target_modules": "all-linear",
        "rank_pattern": {"v_proj": 3, r"layers\.0\..*down_proj": 24, "0.self_attn.q_proj": 1},
        "alpha_pattern": {"^model.layers.1.mlp.up_proj": 5, "o_proj": 0.5},
    },
    {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": ["o_proj", "gate_proj"],
        "rank_pattern": {"gate_proj": 16},
        "alpha_pattern": {"gate_proj": 40},
        "init_lora_weights": "gaussian",
    },
]


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM,
        )
    )


def save_adapter(directory: Path, index: int) -> None:
    """An adapter with weights as training could leave them, saved by peft."""
    model = get_peft_model(base_model(), LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[index]))
    torch.manual_seed(100 + index)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)


def load_peft(directory: Path, index: int) -> dict[str, LoraLayer]:
    """peft's layers by module name, in float64 so that differences are exact enough."""
    model = PeftModel.from_pretrained(base_model(), directory / str(index)).double().eval()
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }
    return {name.removeprefix("base_model.model."): module for name, module in layers.items()}


def packed(directory: Path, rank: int, world: int) -> PackedAdapter:
    layout = tiny_layout(rank, world)
    spec = read_spec(directory, layout)
    adapter = allocate(spec.form(layout, 4), torch.float32, pin=False)
    pack(spec, layout, adapter, lambda done: None)
    return adapter


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("peft")
    for index in range(len(ADAPTERS)):
        save_adapter(root / str(index), index)
    return root


@pytest.fixture(scope="module")
def oracle(saved: Path) -> list[dict[str, LoraLayer]]:
    return [load_peft(saved, index) for index in range(len(ADAPTERS))]


def fill(saved: Path, rank: int, world: int) -> DeviceTier:
    """A device tier with every adapter, adapter i in slot i + 1."""
    tier = DeviceTier(
        1 << 20, len(ADAPTERS), tiny_layout(rank, world), torch.float32, torch.device("cpu")
    )
    offset = 0
    for index in range(len(ADAPTERS)):
        adapter = packed(saved / str(index), rank, world)
        tier.begin_move(adapter, index + 1, offset)
        offset += adapter.nbytes
    tier.wait_all()
    return tier


def expected(layers: dict[str, LoraLayer], name: str, x: torch.Tensor) -> torch.Tensor | None:
    """What peft adds to this module's output; None when the adapter leaves it alone."""
    layer = layers.get(name)
    if layer is None:
        return None
    with torch.no_grad():
        added: torch.Tensor = layer(x.double()) - layer.get_base_layer()(x.double())
    return added.float()


@pytest.mark.parametrize("world", [1, 2])
def test_adds_what_peft_adds(saved: Path, oracle: list[dict[str, LoraLayer]], world: int) -> None:
    slots = torch.arange(len(ADAPTERS) + 1).repeat_interleave(3)
    segments = tuple((slot, 3 * slot, 3 * slot + 3) for slot in range(1, len(ADAPTERS) + 1))
    batch = LoraBatch(slots.int(), segments)
    tiers = [fill(saved, rank, world) for rank in range(world)]
    whole = tiny_layout()
    checked = 0
    for index, site in enumerate(whole.sites):
        x = torch.randn(len(slots), site.in_local, generator=torch.Generator().manual_seed(index))
        found = [torch.zeros(len(slots), target.out_features) for target in site.targets]
        for rank, tier in enumerate(tiers):
            local = tiny_layout(rank, world).sites[index]
            start, stop = local.targets[0].in_range
            y = torch.zeros(len(slots), sum(local.out_splits))
            lora_add_(y, x[:, start:stop].contiguous(), tier.site(index), batch)
            for whole_y, target, part in zip(
                found, local.targets, y.split(list(local.out_splits), 1), strict=True
            ):
                ((out_start, out_stop),) = target.out_ranges
                whole_y[:, out_start:out_stop] += part
        for y, target in zip(found, site.targets, strict=True):
            assert not y[:3].any()
            for slot, start, stop in segments:
                wanted = expected(oracle[slot - 1], target.name, x[start:stop])
                if wanted is None:
                    assert not y[start:stop].any()
                    continue
                checked += 1
                error = (y[start:stop] - wanted).norm() / wanted.norm()
                assert error < 1e-5, (ADAPTERS[slot - 1], target.name, float(error))
    assert checked == sum(len(layers) for layers in oracle)
