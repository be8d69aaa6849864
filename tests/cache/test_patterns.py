"""rank_pattern and alpha_pattern against peft's own matching."""

from __future__ import annotations

import pytest
from peft.utils.other import get_pattern_key

from lorafleet.cache.errors import AdapterUnservable
from lorafleet.cache.patterns import ModulePatterns

MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1, 10)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
]

PATTERNS = [
    {"q_proj": 2},
    {"proj": 2},  # no dot before it: matches nothing
    {"model.layers.0.self_attn.q_proj": 2, "q_proj": 3},
    {"q_proj": 3, "model.layers.0.self_attn.q_proj": 2},
    {"layers.1.mlp.down_proj": 2},  # not layer 10 or 11
    {"^q_proj": 2},
    {"^model.layers.0.self_attn.q_proj": 2},
    {r"layers\.\d+\.mlp\..*": 2},
    {"0.self_attn.(q|o)_proj": 2, ".*o_proj": 5},
    {"q_proj$": 2, ".*": 4},
    {"": 2},
]


@pytest.mark.parametrize("values", PATTERNS, ids=str)
def test_matches_as_peft_does(values: dict[str, int]) -> None:
    patterns = ModulePatterns("rank_pattern", values)
    for module in MODULES:
        assert patterns.get(module, 8) == values.get(get_pattern_key(values, module), 8)


@pytest.mark.parametrize("key", [r"(\w+)*x", "(a|aa)+$", "(?:.*a){20}", "((a?)(a?)){9}" * 3, "*"])
def test_patterns_that_could_backtrack_for_ever_are_refused(key: str) -> None:
    with pytest.raises(AdapterUnservable, match="alpha_pattern"):
        ModulePatterns("alpha_pattern", {key: 1})
