"""On CUDA: adapters with more than LoRA on linears, and of experts, beside plain ones and none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.checkpoints import (
    MOE_RECIPES,
    RECIPES,
    SCALING_RECIPES,
    make_adapters,
    make_checkpoint,
)
from tests.shard.cuda_worker import build, prompts_of, regret, run
from tests.vocabulary_cases import CASES, load_case, make_case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

VOCABULARY = [
    case for case in CASES if case.name in ("lora-both", "saved-both", "tokens", "resized-lora")
]
# bf16 against float32: of a deviation of the logits. Parts draw on more roundings than LoRA alone.
LIMIT = 0.05


def make(family: str, folder: Path) -> Path:
    return make_checkpoint(
        family, folder / "model", hidden_size=256, head_dim=64, initializer_range=0.05
    )


def test_parts_beside_plain_adapters_are_as_likely_as_pefts(tmp_path: Path) -> None:
    base, root = make("llama", tmp_path), tmp_path / "adapters"
    recipes = (*SCALING_RECIPES, RECIPES[3])
    make_adapters(base, root, recipes)
    for case in VOCABULARY:
        make_case(case, base, root / case.name)
    names = [recipe.name for recipe in recipes] + [case.name for case in VOCABULARY]
    worker = build(base, [root / name for name in names], with_graphs=True)
    slots = [0, *range(1, len(names) + 1)]
    prompts = prompts_of(len(slots), seed=6)
    drawn = run(worker, slots, prompts)
    assert drawn == run(worker, slots, prompts)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.to("cuda")
    assert regret(model, prompts[0], drawn[0]) < LIMIT
    for index, recipe in enumerate(recipes, start=1):
        adapted = PeftModel.from_pretrained(model, root / recipe.name)
        assert regret(adapted, prompts[index], drawn[index]) < LIMIT, recipe.name
        model = adapted.unload()
    for index, case in enumerate(VOCABULARY, start=1 + len(recipes)):
        adapted = load_case(case, base, root / case.name).to("cuda")
        assert regret(adapted, prompts[index], drawn[index]) < LIMIT, case.name


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_adapters_of_experts_are_as_likely_as_pefts(family: str, tmp_path: Path) -> None:
    base, root = make(family, tmp_path), tmp_path / "adapters"
    make_adapters(base, root, MOE_RECIPES)
    names = [recipe.name for recipe in MOE_RECIPES]
    worker = build(base, [root / name for name in names], with_graphs=True)
    slots = list(range(len(names) + 1))
    prompts = prompts_of(len(slots), seed=6)
    drawn = run(worker, slots, prompts)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.to("cuda")
    assert regret(model, prompts[0], drawn[0]) < LIMIT
    for index, name in enumerate(names, start=1):
        adapted = PeftModel.from_pretrained(model, root / name)
        assert regret(adapted, prompts[index], drawn[index]) < LIMIT, name
        model = adapted.unload()
