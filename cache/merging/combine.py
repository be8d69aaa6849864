"""How one tensor of several adapters becomes one: peft's `utils/merge_utils.py`, number for number.

TIES is Yadav et al. 2023, arXiv:2306.01708; DARE is Yu et al. 2023, arXiv:2311.03099. The sums are
over members, so they depend on nothing but their order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorafleet.cache.merging.recipe import MajoritySign, MergeRecipe


def combine(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    recipe: MergeRecipe,
    generator: torch.Generator,
) -> torch.Tensor:
    """The members' whole tensors, float32 of one shape, with a weight each, as one of that shape.

    `generator` is drawn from for each tensor in turn, by the strategies that draw.
    """
    kept = torch.stack([_pruned(tensor, recipe, generator) for tensor in tensors])
    factors = torch.tensor(weights).view(-1, *(1,) * (kept.dim() - 1))
    if not recipe.strategy.elects:
        return (kept * factors).sum(dim=0)
    agrees = _agrees(kept, recipe.sign)
    total = (kept * factors * agrees).sum(dim=0)
    return total / agrees.sum(dim=0).clamp(min=1.0)


def _pruned(tensor: torch.Tensor, recipe: MergeRecipe, generator: torch.Generator) -> torch.Tensor:
    """The share `density` of the values, the largest or drawn ones, and zeros."""
    if not recipe.strategy.prunes or recipe.density >= 1:
        return tensor
    if recipe.strategy.draws:
        mask = torch.bernoulli(torch.full_like(tensor, recipe.density), generator=generator)
        return tensor * mask / recipe.density
    count = int(recipe.density * tensor.numel())
    mask = torch.zeros(tensor.numel())
    mask[tensor.abs().flatten().topk(count, sorted=False).indices] = 1
    return tensor * mask.view(tensor.shape)


def _agrees(kept: torch.Tensor, method: MajoritySign) -> torch.Tensor:
    """Which members have the elected sign, value by value; zero counts as positive when elected."""
    signs = kept.sign()
    votes = kept if method is MajoritySign.TOTAL else signs
    return signs == torch.where(votes.sum(dim=0) >= 0, 1, -1)
