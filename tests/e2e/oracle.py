"""What transformers + peft answer, one request at a time, in float32."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorafleet.cache.merging.recipe import MergeRecipe
from tests.peft_merges import add_merge


class Oracle:
    """Greedy answers of a checkpoint with any of its adapters."""

    def __init__(self, model: Path, adapter_root: Path, adapters: list[str]) -> None:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        # A model for each: of adapters of experts, peft has several in one only if all change the
        # same parameters.
        self._models: dict[str | None, Any] = {
            name: PeftModel.from_pretrained(deepcopy(base), adapter_root / name)
            for name in adapters
        }
        self._models[None] = base
        self._adapter_root = adapter_root

    def merge(self, recipe: MergeRecipe) -> None:
        """Adds a merge of the adapters, called as its recipe's seed."""
        name, members = str(recipe.seed), {m.key.id.rpartition("/")[2] for m in recipe.members}
        model: Any = None
        for member in sorted(members):
            directory = self._adapter_root / member
            if model is None:
                base = deepcopy(self._models[None])
                model = PeftModel.from_pretrained(base, directory, adapter_name=member)
            else:
                model.load_adapter(directory, adapter_name=member)
        add_merge(model, recipe, name)
        model.set_adapter(name)
        self._models[name] = model

    def load_only(self, adapter_root: Path, name: str) -> None:
        """Takes the place of the adapters there are, so that a thousand need no room."""
        base = self._models[None]
        adapted = PeftModel.from_pretrained(deepcopy(base), adapter_root / name)
        self._models = {None: base, name: adapted}

    @torch.no_grad()
    def answer(self, prompt_ids: list[int], adapter: str | None, max_new_tokens: int) -> list[int]:
        """Token ids after the prompt, the EOS token included when it ends the answer."""
        ids = torch.tensor([prompt_ids])
        output = self._models[adapter].generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        answer: list[int] = output[0, len(prompt_ids) :].tolist()
        return answer
