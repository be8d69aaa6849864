"""Experts' matrices out of checkpoints that hold all experts of a layer in one tensor.

The hub's checkpoints, and what `save_pretrained` writes unless told otherwise, have a matrix for
each expert: `block_sparse_moe.experts.N.w1.weight` in Mixtral, `mlp.experts.N.gate_proj.weight` in
Qwen3-MoE. As transformers 5 lays a model out in memory they are `mlp.experts.gate_up_proj`
[experts, 2 * intermediate, hidden] and `mlp.experts.down_proj` [experts, hidden, intermediate].
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

_EXPERT = re.compile(r"(.+)\.(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(\w+)\.weight")
_ROUTER = re.compile(r"(.+)\.block_sparse_moe\.gate\.weight")

# The fused tensor, the part of its rows, and how many parts there are.
_PLACES = {
    "w1": ("gate_up_proj", 0, 2),
    "w3": ("gate_up_proj", 1, 2),
    "w2": ("down_proj", 0, 1),
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
    "down_proj": ("down_proj", 0, 1),
}


class FusedPlace(NamedTuple):
    """Where the matrix of a name is; `expert` None: it is the whole tensor."""

    tensor: str
    expert: int | None = None
    part: int = 0
    num_parts: int = 1


def fused_place(name: str) -> FusedPlace | None:
    """Where a checkpoint of fused experts has the matrix; None if it has no other place."""
    if found := _ROUTER.fullmatch(name):
        return FusedPlace(f"{found[1]}.mlp.gate.weight")
    found = _EXPERT.fullmatch(name)
    if found is None or found[3] not in _PLACES:
        return None
    tensor, part, num_parts = _PLACES[found[3]]
    return FusedPlace(f"{found[1]}.mlp.experts.{tensor}", int(found[2]), part, num_parts)


class ExpertSlice:
    """One expert's matrix within a safetensors slice [experts, rows, columns]; reads what is asked.

    Indexed as a safetensors slice is: `[start:stop]` or `[:, start:stop]`, both bounds given.
    """

    def __init__(self, tensor: Any, place: FusedPlace) -> None:
        self._tensor, self._expert = tensor, place.expert
        self._rows = tensor.get_shape()[1] // place.num_parts
        self._first = place.part * self._rows

    def __getitem__(self, index: slice | tuple[slice, slice]) -> Any:
        first, stop = self._first, self._first + self._rows
        if isinstance(index, tuple):
            return self._tensor[self._expert, first:stop, index[1]]
        return self._tensor[self._expert, first + index.start : min(first + index.stop, stop)]
