"""BaseWeights: the served model's own weights, on which some adapters' parts depend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from lorafleet.cache.layout import Interval

if TYPE_CHECKING:
    import torch


class BaseWeights(Protocol):
    """The whole model's weights, whichever part of it this rank computes with. Thread-safe."""

    def rows(self, name: str, intervals: Sequence[Interval]) -> torch.Tensor:
        """Runs of the first dimension of a tensor such as `model.layers.0.mlp.up_proj.weight`.

        In the dtype the model is served in, on the CPU. Raises SourceUnavailable when the model's
        files cannot be read any more.
        """
