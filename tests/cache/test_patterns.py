"""rank_pattern and alpha_pattern against peft's own matching."""

from __future__ import annotations

from contextlib import suppress
from time import process_time

import pytest
from peft.utils.other import get_pattern_key

from lorafleet.cache.errors import AdapterUnservable
from lorafleet.cache.patterns import ModulePatterns, name_pattern

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


@pytest.mark.parametrize(
    "key",
    [
        "(?x)(?:.+) +!",  # blanks between the group and its repetition mean nothing
        "(?x:(?:.+) +)!",
        "(?i-x:a)",
        "(?:.+)(?#)+!",
        r"(.+)\1+!",
        "(?P<a>.+)(?P=a)",
        "(?>.+)!",
        f"({'|' * 20})({'|' * 20})({'|' * 20})({'|' * 20}).*!",
        f".*.*.*({'|' * 99})!",
        r"(\(*\(*)\(*\(*!",
    ],
)
def test_repetitions_do_not_hide(key: str) -> None:
    assert name_pattern("target_modules", key) is None
    with pytest.raises(AdapterUnservable, match="rank_pattern"):
        ModulePatterns("rank_pattern", {key: 1})


@pytest.mark.parametrize(
    "key",
    [
        r"^(?!.*lm_head).*layers\.\d+\.(mlp|attn)\.(q_proj|k_proj|v_proj|o_proj|up_proj|down_proj)$",
        r"^(model\.language_model(?=\.).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj))$",
        r".*\.(?:q|v)_proj",
    ],
)
def test_what_people_write_is_matched(key: str) -> None:
    assert name_pattern("target_modules", key) is not None


@pytest.mark.parametrize("key", [".*.*.*[AB]", ".*.*.*(?=A)", f"({'|' * 16})" * 4 + "A"])
def test_what_is_not_refused_takes_little_time(key: str) -> None:
    """As many keys as are let through, on names as long as a model's."""
    values = {f"{key}{number}": 8 for number in range(64)}
    while values:
        with suppress(AdapterUnservable):
            patterns = ModulePatterns("rank_pattern", values)
            break
        values.popitem()
    began = process_time()
    for name in ("a." * 30, "model.layers.10.block_sparse_moe.experts.127.gate_proj"):
        patterns.get(name, 8)
    assert process_time() - began < 1.0
