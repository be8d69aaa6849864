"""What LoRA a step is captured for: how large ranks may be, and whether its slots are few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lorafleet.kernels.lora.cuda import GROUP, are_few

# Largest rank of an adapter in the step: the grids of the LoRA kernels are captured for it.
RANK_CLASSES = (16, 64, 512)
_USUAL_RANKS = RANK_CLASSES[:2]


class LoraClass(NamedTuple):
    """`max_rank`: 0 for steps without adapters. `is_few`: as LoraBatch has it."""

    max_rank: int
    is_few: bool = False


NO_LORA = LoraClass(0)


def rank_class(max_rank: int) -> int:
    """The smallest class that holds a rank; 0 for 0."""
    return next(rank for rank in (0, *RANK_CLASSES) if max_rank <= rank)


def decode_class(slots: Sequence[int], size: int, max_rank: int) -> LoraClass:
    """Of a step in the decode form whose tokens have these slots, padded to `size` tokens."""
    rank = rank_class(max_rank)
    if not rank or not are_few(size, 1, rank):
        return LoraClass(rank)
    groups = {(token // GROUP, slot) for token, slot in enumerate(slots) if slot}
    return LoraClass(rank, are_few(size, len(groups), rank))


def decode_classes(size: int) -> list[LoraClass]:
    """All that steps of a size in the decode form can be of, of usual ranks."""
    classes = [NO_LORA]
    for rank in _USUAL_RANKS:
        if are_few(size, 1, rank):
            classes.append(LoraClass(rank, is_few=True))
        if not are_few(size, size, rank):
            classes.append(LoraClass(rank))
    return classes


def any_class(max_rank: int) -> LoraClass:
    """Of a step where it makes no difference whether slots are few."""
    return LoraClass(rank_class(max_rank))


def any_classes() -> list[LoraClass]:
    """All such, of usual ranks."""
    return [NO_LORA, *map(LoraClass, _USUAL_RANKS)]
