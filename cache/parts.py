"""Parts: what an adapter has besides LoRA on linear layers, as named tensors beside its sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafleet.cache.safetensors_file import TensorRef

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class PartSpec:
    """One tensor of the packed form and how it comes from the adapter's files.

    `shape` is what this rank holds. `build` gets the whole tensors of `refs`, in the file's dtypes,
    and returns this rank's part in any float dtype; values that are not finite are refused after.
    Every rank has the same parts by name, some perhaps empty, so that ranks compute in step.
    """

    name: str
    shape: tuple[int, ...]
    refs: tuple[TensorRef, ...]
    build: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    module: str = ""  # full name of the module it changes
    rank: int = 0  # of the LoRA it belongs to
