"""A thousand small adapters, made cheaply: one saved by peft, the others like it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.checkpoints import Recipe, make_adapters

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_RANKS = (1, 2, 4, 8, 16)
_TARGETS = (("q_proj",), ("q_proj", "v_proj"), _ALL[:4], _ALL[4:], ("k_proj", "gate_proj"), _ALL)


@dataclass(frozen=True)
class Popularity:
    """Zipf's law: the i-th name is asked for 1 / i ** exponent times as often as the first."""

    names: Sequence[str]
    exponent: float = 1.0

    def draw(self, random: Random, count: int) -> list[str]:
        """Whom `count` requests ask for."""
        weights = accumulate(1 / (i + 1) ** self.exponent for i in range(len(self.names)))
        return random.choices(self.names, cum_weights=list(weights), k=count)


def write_many(model: Path, root: Path, count: int, seed: int = 0) -> list[str]:
    """Writes `root`/a0 ...: ranks 1 to 16, different targets, weights of their own."""
    make_adapters(model, root.parent / "first", (Recipe("all", 1, 2, _ALL),))
    first = root.parent / "first" / "all"
    config = json.loads((first / CONFIG).read_text())
    tensors = load_file(first / WEIGHTS)
    with safe_open(first / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    generator = torch.Generator().manual_seed(seed)
    names = [f"a{number}" for number in range(count)]
    for number, name in enumerate(names):
        rank, targets = _RANKS[number % len(_RANKS)], _TARGETS[number % len(_TARGETS)]
        chosen = {k: t for k, t in tensors.items() if k.split(".")[-3] in targets}
        changed = {"r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(targets)}
        (root / name).mkdir(parents=True)
        (root / name / CONFIG).write_text(json.dumps(config | changed))
        made = {key: _like(key, tensor, rank, generator) for key, tensor in chosen.items()}
        save_file(made, root / name / WEIGHTS, metadata)
    return names


def _like(key: str, tensor: torch.Tensor, rank: int, generator: torch.Generator) -> torch.Tensor:
    """Random weights of another rank; wide enough that every adapter answers otherwise."""
    side_a = ".lora_A." in key
    shape = (rank, tensor.shape[1]) if side_a else (tensor.shape[0], rank)
    return torch.randn(shape, generator=generator) * (0.12 if side_a else 0.2)
