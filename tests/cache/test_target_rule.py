"""TargetRule names the modules peft names."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

from lorafleet.cache.errors import AdapterUnservable
from lorafleet.cache.target_rule import TargetRule

MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1, 2, 11)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": ["proj", "1.mlp.down_proj", "model.layers.2.mlp.up_proj"]},
        {"target_modules": r".*\.layers\.1\.(self_attn\.q|mlp\.up)_proj"},
        {"target_modules": r"layers\.1\..*"},
        {"target_modules": r"model\.layers\.\d\.mlp.*"},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [11]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "b"]},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["0.self_attn.q_proj", "mlp"]},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*\.0\..*"},
        {"target_modules": ["q_proj"], "exclude_modules": []},
    ],
)  # fmt: skip
def test_as_peft(fields: dict[str, Any]) -> None:
    rule, config = TargetRule(fields), LoraConfig(**fields)
    for module in MODULES:
        found = check_target_module_exists(config, module)
        is_named = bool(found) and not isinstance(found, _ExcludedModule)
        assert (not rule.left_out_by(module)) == is_named, module


def test_the_field_is_told() -> None:
    module = "model.layers.0.mlp.up_proj"
    assert TargetRule({"target_modules": ["q_proj"]}).left_out_by(module) == "target_modules"
    excluded = {"target_modules": "all-linear", "exclude_modules": ["up_proj"]}
    assert TargetRule(excluded).left_out_by(module) == "exclude_modules"
    layers = {"target_modules": ["up_proj"], "layers_to_transform": [1]}
    assert TargetRule(layers).left_out_by(module) == "layers_to_transform"


@pytest.mark.parametrize(
    "targets",
    ["all-linear", "All-Linear", None, r"(?:.*?(?:text|vision).*?(?:attn|mlp).*?(?:q_proj).*?)"],
)
def test_where_nothing_can_tell_tensors_decide(targets: str | None) -> None:
    rule = TargetRule({"target_modules": targets})
    assert not any(map(rule.left_out_by, MODULES))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", {"q_proj": 1}),
        ("target_modules", [1]),
        ("target_modules", "q_(proj"),
        ("exclude_modules", "q_[proj"),
        ("exclude_modules", 3),
        ("layers_to_transform", "1"),
        ("layers_to_transform", [1.5]),
        ("layers_to_transform", True),
        ("layers_pattern", 1),
    ],
)
def test_a_malformed_field_is_named(field: str, value: Any) -> None:
    with pytest.raises(AdapterUnservable, match=field):
        TargetRule({field: value})
