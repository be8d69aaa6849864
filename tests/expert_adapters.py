"""Adapters of single experts' linears, from before transformers 5 fused the experts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

EACH = "r4-each"  # adapts the router, every expert and the query projections

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.lora_([AB])\.weight")
_STACKED = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
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
    return _write(directory, config, tensors)


def write_shared_outer(each: Path, single: Path, stacked: Path, fuse: bool) -> None:
    """Of an adapter of single experts one whose outer sides all experts share, in both forms.

    `single` has a copy for each expert. `stacked` has w1, w3 and w2 of all experts, or with `fuse`
    gate_up_proj and down_proj; gate and up have the same A then.
    """
    config = json.loads((each / "adapter_config.json").read_text())
    tensors = load_file(each / "adapter_model.safetensors")
    experts = {name: found for name in tensors if (found := _EXPERT.fullmatch(name))}
    num_experts = 1 + max(int(found[2]) for found in experts.values())
    leaves = {_STACKED.get(found[3], found[3]): found[3] for found in experts.values()}
    singles = {name: tensor for name, tensor in tensors.items() if name not in experts}
    stacks = dict(singles)
    for path in {found[1] for found in experts.values()}:

        def name(leaf: str, side: str, expert: int, path: str = path) -> str:
            return f"{path}.{expert}.{leaves[leaf]}.lora_{side}.weight"

        stack = {
            (leaf, side): torch.stack([tensors[name(leaf, side, e)] for e in range(num_experts)])
            for leaf in leaves
            for side in "AB"
        }
        for leaf, side in (("w1", "A"), ("w3", "A"), ("w2", "B")):
            stack[leaf, side] = stack["w1" if fuse and side == "A" else leaf, side][:1]
        for (leaf, side), tensor in stack.items():
            for e, matrix in enumerate(tensor.expand(num_experts, -1, -1)):
                singles[name(leaf, side, e)] = matrix.clone()
        if fuse:
            gate_up = torch.cat([stack["w1", "B"], stack["w3", "B"]], 1)
            stack = {
                ("gate_up_proj", "A"): stack["w1", "A"], ("gate_up_proj", "B"): gate_up,
                ("down_proj", "A"): stack["w2", "A"], ("down_proj", "B"): stack["w2", "B"],
            }  # fmt: skip
        stacks |= {f"{path}.{leaf}.lora_{side}.weight": t for (leaf, side), t in stack.items()}
    _write(single, config, singles)
    _write(stacked, config | {"target_modules": "all-linear"}, stacks)


def _write(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory
