"""Adapters of single experts' linears, from before transformers 5 fused the experts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

EACH = "r4-each"  # adapts the router, every expert and the query projections

_TARGETS = re.compile(r".*\.(q_proj|gate|experts\.\d+\.(\w+))\.weight")


def write_each(model: Path, directory: Path, rank: int = 4, alpha: float = 6) -> Path:
    """Writes such an adapter for a checkpoint that has a matrix for each expert."""
    generator = torch.Generator().manual_seed(5)
    tensors, modules = {}, set()
    for name, weight in sorted(load_file(model / "model.safetensors").items()):
        if found := _TARGETS.fullmatch(name):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            out_features, in_features = weight.shape
            a, b = (rank, in_features), (out_features, rank)
            tensors[f"{module}.lora_A.weight"] = torch.randn(a, generator=generator) * 0.2
            tensors[f"{module}.lora_B.weight"] = torch.randn(b, generator=generator) * 0.2
            modules.add(found[2] or found[1])
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(model),
        "r": rank, "lora_alpha": alpha, "bias": "none", "target_modules": sorted(modules),
    }  # fmt: skip
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory
