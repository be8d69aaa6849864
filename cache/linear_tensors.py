"""The tensors peft saves for a linear layer, by what their names end with."""

from __future__ import annotations

from collections.abc import Mapping

from lorafleet.cache.safetensors_file import TensorRef

LORA_A, LORA_B = "lora_A", "lora_B"
LORA_BIAS = "lora_B.bias"
MAGNITUDE = "lora_magnitude_vector"
BIAS = "bias"

# peft keeps the adapter's name out of its files; state dicts saved by hand have it, as "default".
_SUFFIXES = {
    ".lora_A.weight": LORA_A,
    ".lora_B.weight": LORA_B,
    ".lora_B.bias": LORA_BIAS,
    ".lora_A.default.weight": LORA_A,
    ".lora_B.default.weight": LORA_B,
    ".lora_B.default.bias": LORA_BIAS,
    ".lora_magnitude_vector": MAGNITUDE,
    ".lora_magnitude_vector.weight": MAGNITUDE,
    ".lora_magnitude_vector.default": MAGNITUDE,
    ".lora_magnitude_vector.default.weight": MAGNITUDE,
    ".base_layer.bias": BIAS,
    ".bias": BIAS,
}

LinearTensors = Mapping[str, TensorRef]  # by kind


def split_name(name: str) -> tuple[str, str] | None:
    """The module and the kind of tensor; None for what is no tensor of a linear."""
    suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
    return None if suffix is None else (name.removesuffix(suffix), _SUFFIXES[suffix])
