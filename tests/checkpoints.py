"""Tiny random checkpoints of every supported family, and adapters for them, made on the spot.

Weights are wide enough (initializer_range 0.2) that the likeliest token is clearly so: greedy
decoding then depends on the mathematics, not on rounding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.fake_tokenizer import VOCAB_SIZE, tokenizer_config_json, tokenizer_json

EOS = 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}

# What sets a family apart from the others is switched on: biases, ties, windows, soft caps.
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, {"sliding_window": 24}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 24}),
    "gemma": (GemmaConfig, {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": (Gemma2Config, {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16}),
    "phi3": (Phi3Config, {"partial_rotary_factor": 0.5}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            "head_dim": 24,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 72,
            "decoder_sparse_step": 2,  # the first layer is dense
        },
    ),
}


@dataclass(frozen=True)
class Recipe:
    """How one adapter of the test set is made; targets are named as Llama names them."""

    name: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
ALL_LINEAR = _ATTENTION + _MLP

RECIPES = (
    Recipe("r1-q", 1, 4, ("q_proj",)),
    Recipe("r4-qv", 4, 8, ("q_proj", "v_proj")),
    Recipe("r8-attention", 8, 8, _ATTENTION),
    Recipe("r16-all", 16, 8, ALL_LINEAR),
    Recipe("r64-down", 64, 32, ("down_proj",)),
    Recipe("r8-rslora", 8, 6, _MLP, {"use_rslora": True}),
    Recipe("r8-pattern", 8, 16, _ATTENTION, {"rank_pattern": {"o_proj": 3}}),
    Recipe("r4-gate-k", 4, 12, ("k_proj", "gate_proj")),
)

# These change a linear's output besides adding to it.
SCALING_RECIPES = (
    Recipe("r4-dora", 4, 8, ALL_LINEAR, {"use_dora": True}),
    Recipe("r4-lora-bias", 4, 8, ("v_proj", "o_proj"), {"lora_bias": True}),
)

# Experts' gate and up go together: peft has no adapter of one of them alone. What it makes of their
# names are target_parameters.
MOE_RECIPES = (
    RECIPES[1], *RECIPES[3:6],
    Recipe("r4-router", 4, 8, ("gate",)),
    Recipe(
        "r8-parameters", 8, 16, ("q_proj",),
        {
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 3},
            "alpha_pattern": {"gate_up_proj": 6},
        },
    ),
    Recipe("r2-gate-up", 2, 4, (), {"target_parameters": ["experts.gate_up_proj"]}),
)  # fmt: skip

_RENAMED = {
    "phi3": {
        "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj",
        "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
    },
    "mixtral": {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
}  # fmt: skip


def recipes_of(family: str) -> tuple[Recipe, ...]:
    """The adapters that the tests make for a family."""
    return MOE_RECIPES if has_experts(family) else RECIPES + SCALING_RECIPES


def has_experts(family: str) -> bool:
    """Whether the family's MLPs are mixtures of experts."""
    return family in ("mixtral", "qwen3_moe")


def make_checkpoint(
    family: str, directory: Path, seed: int = 0, shard_size: str = "50GB", **changes: Any
) -> Path:
    """Writes a model folder with tokenizer; `changes` override the family's config."""
    torch.manual_seed(seed)
    config_class, options = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(config_class(**_COMMON | options | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.save_pretrained(directory, max_shard_size=shard_size)
    (directory / "tokenizer.json").write_bytes(tokenizer_json())
    (directory / "tokenizer_config.json").write_bytes(tokenizer_config_json())
    return directory


def make_adapters(model_directory: Path, root: Path, recipes: tuple[Recipe, ...] = RECIPES) -> None:
    """Writes one PEFT folder per recipe under `root`, named as the recipe."""
    family = json.loads((model_directory / "config.json").read_text())["model_type"]
    renamed = _RENAMED.get(family, {})
    for seed, recipe in enumerate(recipes, start=1):
        torch.manual_seed(seed)
        targets = {renamed.get(target, target) for target in recipe.targets}
        config = LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,  # peft scales by any number
            target_modules=sorted(targets),
            task_type="CAUSAL_LM",
            **recipe.options,
        )
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_directory), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:  # peft starts B at zero, which would change nothing
                    parameter.normal_(std=0.2)
                if ".lora_magnitude_vector." in name:
                    parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.3))
        model.save_pretrained(root / recipe.name)
