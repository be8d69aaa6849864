"""What DoRA and biases do to a linear's output, as a part: y' = scale * y + shift.

DoRA (https://huggingface.co/papers/2402.09353, peft's tuners/lora/dora.py) is
g * (W x + s B A x) + b with g = magnitude / ||W + s B A||, one norm for each output; `lora_bias`
adds s * bias to the update, and a saved bias of the base layer stands in the base's own place.
The base weights do not change, so scale and shift are computed once, when an adapter is packed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lorafleet.cache.base_weights import BaseWeights
from lorafleet.cache.errors import AdapterUnservable
from lorafleet.cache.layout import Interval, TargetModule
from lorafleet.cache.linear_tensors import BIAS, LORA_A, LORA_B, LORA_BIAS, MAGNITUDE, LinearTensors
from lorafleet.cache.parts import PartSpec

_BLOCK_ELEMENTS = 1 << 24  # of a base weight in float32 at a time


def scale_shift_name(target: str) -> str:
    """The part of a target: [2, out_local], the scale over the shift."""
    return f"{target}.scale_shift"


def scale_shift_part(
    target: TargetModule, scale: float, tensors: LinearTensors, base: BaseWeights | None
) -> PartSpec | None:
    """The part these tensors make, None where they are nothing but A and B.

    `scale` is the factor on B(A(x)). Raises AdapterUnservable without base weights that it needs.
    """
    if not tensors.keys() & {LORA_BIAS, MAGNITUDE, BIAS}:
        return None
    if base is None and tensors.keys() & {MAGNITUDE, BIAS}:
        raise AdapterUnservable(
            f"{target.name} has {MAGNITUDE if MAGNITUDE in tensors else BIAS}, which needs the "
            "weights of the base model; this server runs without them (--load-format dummy)."
        )
    kinds = tuple(tensors)
    build = _ScaleShift(target, scale, kinds, base)
    refs = tuple(tensors.values())
    return PartSpec(scale_shift_name(target.name), (2, target.out_local), refs, build)


@dataclass(frozen=True, slots=True)
class _ScaleShift:
    """Computes a part from tensors of the given kinds, in float32."""

    target: TargetModule
    factor: float
    kinds: tuple[str, ...]
    base: BaseWeights | None

    def __call__(self, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """[2, out_local]."""
        tensors = {kind: weight.float() for kind, weight in zip(self.kinds, weights, strict=True)}
        scale = self._scale(tensors)
        return torch.stack([scale, self._shift(tensors, scale)])

    def _scale(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        if MAGNITUDE not in tensors:
            return torch.ones(self.target.out_local)
        norms = [self._norms(tensors, interval) for interval in self._blocks()]
        return self._local(tensors[MAGNITUDE]) / torch.cat(norms)

    def _norms(self, tensors: dict[str, torch.Tensor], interval: Interval) -> torch.Tensor:
        """||W + s B A|| of some outputs, over all inputs, also those of other ranks."""
        assert self.base is not None
        weight = self.base.rows(f"{self.target.name}.weight", (interval,)).float()
        b = tensors[LORA_B][slice(*interval)]
        norms: torch.Tensor = torch.linalg.vector_norm(
            weight.addmm_(b, tensors[LORA_A], alpha=self.factor), dim=1
        )
        return norms

    def _blocks(self) -> Iterator[Interval]:
        step = max(1, _BLOCK_ELEMENTS // self.target.in_features)
        for first, stop in self.target.out_ranges:
            for start in range(first, stop, step):
                yield start, min(start + step, stop)

    def _shift(self, tensors: dict[str, torch.Tensor], scale: torch.Tensor) -> torch.Tensor:
        shift = torch.zeros(self.target.out_local)
        if LORA_BIAS in tensors:
            shift += self.factor * scale * self._local(tensors[LORA_BIAS])
        if self.target.has_bias and (BIAS in tensors or MAGNITUDE in tensors):
            assert self.base is not None
            own = self.base.rows(f"{self.target.name}.bias", self.target.out_ranges).float()
            wanted = self._local(tensors[BIAS]) if BIAS in tensors else own
            # Where ranks' outputs sum, the bias comes after the scale.
            shift += wanted - (own if self.target.is_partial else scale * own)
        return shift

    def _local(self, vector: torch.Tensor) -> torch.Tensor:
        return torch.cat([vector[start:stop] for start, stop in self.target.out_ranges])
