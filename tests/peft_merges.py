"""What peft makes of a recipe, drawing the random numbers that the recipe says."""

from __future__ import annotations

import warnings
from typing import Any
from unittest.mock import patch

import peft.tuners.lora.model as peft_lora
import torch
from peft import PeftModel

from lorafleet.cache.merging.recipe import MergeRecipe


def add_merge(model: PeftModel, recipe: MergeRecipe, name: str) -> None:
    """Adds the merge of adapters that `model` has under the last parts of the members' ids."""
    freeze = peft_lora._freeze_adapter

    def seed_and_freeze(*args: Any) -> None:
        freeze(*args)
        torch.manual_seed(recipe.seed)  # after the new adapter's own initial values are drawn

    with patch.object(peft_lora, "_freeze_adapter", seed_and_freeze), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a density of 1 prunes nothing
        model.add_weighted_adapter(
            [member.key.id.rpartition("/")[2] for member in recipe.members],
            [member.weight for member in recipe.members],
            name,
            combination_type=recipe.strategy.value,
            density=recipe.density,
            majority_sign_method=recipe.sign.value,
        )
