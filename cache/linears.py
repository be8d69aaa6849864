"""An adapter's linear layers: which tensors each has, and whether that can be served exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorafleet.cache.base_weights import BaseWeights
from lorafleet.cache.errors import AdapterUnservable, shown
from lorafleet.cache.expert_files import ExpertFiles
from lorafleet.cache.layout import ModelLayout, TargetModule
from lorafleet.cache.linear_parts import scale_shift_part
from lorafleet.cache.linear_tensors import (
    BIAS,
    LORA_A,
    LORA_B,
    LORA_BIAS,
    MAGNITUDE,
    LinearTensors,
    split_name,
)
from lorafleet.cache.parts import PartSpec
from lorafleet.cache.peft_config import PeftConfig
from lorafleet.cache.safetensors_file import TensorRef

PREFIX = "base_model.model."
_BASE_WEIGHT = ".base_layer.weight"
_DTYPES = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One module's adapter: A [rank, in_features], B [out_features, rank], factor on B(A(x))."""

    target: TargetModule
    rank: int
    scale: float
    a: TensorRef
    b: TensorRef


@dataclass(frozen=True, slots=True)
class Linears:
    """What an adapter does to linear layers."""

    modules: dict[str, ModuleSpec]  # by full module name
    parts: tuple[PartSpec, ...]


def read_linears(
    tensors: Mapping[str, TensorRef],
    config: PeftConfig,
    layout: ModelLayout,
    base: BaseWeights | None,
) -> Linears:
    """What these tensors, by their names in the file, do to linear layers.

    Raises AdapterUnservable for a tensor that is none of a linear layer of the model, does not fit
    it, or is not what the config says.
    """
    targets, experts = layout.targets(), layout.moe_targets()
    files = ExpertFiles(_by_module(tensors), config, layout)
    modules, parts = {}, []
    for name, found in files.modules.items():
        if name not in targets:
            raise AdapterUnservable(
                f"The adapter changes the module {shown(name)}, which is not among the adaptable "
                f"linear layers of {layout.model_id}; it was made for {shown(config.base_model)}."
            )
        target, known_as = targets[name], files.config_name(name)
        rank, scale = config.rank_of(known_as), config.scale_of(known_as)
        _check_tensors(target, found, rank, config, layout)
        if found.keys() != {BIAS}:
            _check_kinds(target, known_as, found, config)
        if name in experts and found.keys() != {LORA_A, LORA_B}:
            kind = min(found.keys() - {LORA_A, LORA_B})
            raise AdapterUnservable(f"{name} has {kind}, which is not served on experts.")
        if LORA_A in found:
            modules[name] = ModuleSpec(target, rank, scale, found[LORA_A], found[LORA_B])
        part = scale_shift_part(target, scale, found, base)
        if part is not None:
            parts.append(part)
    return Linears(modules, tuple(parts))


def _by_module(tensors: Mapping[str, TensorRef]) -> dict[str, dict[str, TensorRef]]:
    """Module name -> its tensors by kind."""
    modules: dict[str, dict[str, TensorRef]] = {}
    for name, tensor in tensors.items():
        if name.endswith(_BASE_WEIGHT):
            raise AdapterUnservable(
                f"The tensor {shown(name)} takes the place of a weight of the base model, which is "
                "not served."
            )
        split = split_name(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
        if split is None:
            raise AdapterUnservable(
                f"The tensor {shown(name)} is not one that is served: names must be "
                "base_model.model.<module> followed by .lora_A.weight, .lora_B.weight, "
                ".lora_B.bias, .lora_magnitude_vector or .base_layer.bias."
            )
        module, kind = split
        found = modules.setdefault(module, {})
        if kind in found:
            raise AdapterUnservable(f"{shown(module)} has {kind} twice, under different names.")
        found[kind] = tensor
    return modules


def _check_tensors(
    target: TargetModule,
    found: LinearTensors,
    rank: int,
    config: PeftConfig,
    layout: ModelLayout,
) -> None:
    if BIAS in found and not target.has_bias:
        raise AdapterUnservable(
            f"The adapter has a bias for {target.name}, which has none in {layout.model_id}."
        )
    shapes: dict[str, tuple[int, ...]] = {
        LORA_A: (rank, target.in_features),
        LORA_B: (target.out_features, rank),
    }
    for kind, tensor in found.items():
        if tensor.dtype not in _DTYPES:
            raise AdapterUnservable(
                f"{kind} of {target.name} is {tensor.dtype}; it must be one of "
                f"{', '.join(_DTYPES)}."
            )
        _check_shape(target, kind, tensor, shapes.get(kind, (target.out_features,)), config, layout)


def _check_kinds(
    target: TargetModule, known_as: str, found: LinearTensors, config: PeftConfig
) -> None:
    """Raises AdapterUnservable unless the module has what peft makes with this config."""
    field = "" if config.targets_weight_of(known_as) else config.targets.left_out_by(known_as)
    if field:
        raise AdapterUnservable(
            f"{field} leaves out {target.name}, for which the adapter has weights; peft would "
            "pass over them."
        )
    for kind, other in ((LORA_A, LORA_B), (LORA_B, LORA_A)):
        if kind not in found:
            has = other if other in found else next(iter(found))
            raise AdapterUnservable(f"{target.name} has {has} and no {kind}.")
    for field, is_set, kind in (
        ("use_dora", config.use_dora, MAGNITUDE),
        ("lora_bias", config.lora_bias, LORA_BIAS),
    ):
        if is_set != (kind in found):
            raise AdapterUnservable(
                f"{field} is {str(is_set).lower()} and {target.name} has "
                f"{'no' if is_set else 'a'} {kind}."
            )


def _check_shape(
    target: TargetModule,
    kind: str,
    tensor: TensorRef,
    wanted: tuple[int, ...],
    config: PeftConfig,
    layout: ModelLayout,
) -> None:
    if tensor.shape != wanted:
        raise AdapterUnservable(
            f"{kind} of {target.name} has shape {list(tensor.shape)}; with the config's rank "
            f"it must be {list(wanted)} on {layout.model_id}; the adapter was made for "
            f"{shown(config.base_model)}."
        )
