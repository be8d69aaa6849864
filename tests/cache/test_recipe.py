"""Recipes: one spelling each, read back as they were written, and nothing else is one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.cache.merging.recipe import (
    MAX_LENGTH,
    MAX_WEIGHT,
    MajoritySign,
    Member,
    MergeRecipe,
    Strategy,
    members_of,
)
from lorafleet.proto.messages import AdapterKey

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
KEYS = st.builds(
    AdapterKey,
    st.sampled_from(["local", "hub", "s3", "http"]),
    NAMES,
    st.one_of(st.just(""), NAMES),
)
MEMBERS = st.builds(Member, KEYS, st.floats(-MAX_WEIGHT, MAX_WEIGHT))
ONE, TWO = AdapterKey("local", "one"), AdapterKey("hub", "owner/two", "v2")
HALVES = (Member(ONE, 0.5), Member(TWO, -0.25))


@given(
    st.lists(MEMBERS, min_size=2, max_size=16),
    st.sampled_from(Strategy),
    st.floats(0, 1, exclude_min=True),
    st.sampled_from(MajoritySign),
)
def test_a_recipe_is_read_back_from_its_spelling(
    members: list[Member], strategy: Strategy, density: float, sign: MajoritySign
) -> None:
    recipe = MergeRecipe(
        tuple(members),
        strategy,
        density if strategy.prunes else 1.0,
        sign if strategy.elects else MajoritySign.TOTAL,
    )
    assert MergeRecipe.parse(str(recipe)) == recipe
    assert str(recipe).isascii()
    assert str(recipe).isprintable()
    assert members_of(recipe.key) == tuple(dict.fromkeys(member.key for member in members))


def test_the_spelling_is_what_people_can_read() -> None:
    assert str(MergeRecipe(HALVES)) == "linear(0.5*local:one,-0.25*hub:owner/two@v2)"
    ties = MergeRecipe(HALVES, Strategy.DARE_TIES, 0.3, MajoritySign.FREQUENCY)
    assert str(ties) == "dare_ties[0.3,frequency](0.5*local:one,-0.25*hub:owner/two@v2)"
    assert str(MergeRecipe(HALVES, Strategy.DARE_LINEAR, 0.3)).startswith("dare_linear[0.3](")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "linear",
        "linear()",
        "linear(0.5*local:one)",
        "linear(0.5*local:one,0.5*local:two,)",
        "linear(.5*local:one,0.5*local:two)",
        "linear(5e-1*local:one,0.5*local:two)",
        "linear(0.5*local:one, 0.5*local:two)",
        "linear(nan*local:one,0.5*local:two)",
        "linear(0.5*local:one,1001.0*local:two)",
        "linear[0.5](0.5*local:one,0.5*local:two)",
        "linear(0.5*local:o%6ee,0.5*local:two)",
        "linear(0.5*local:one@,0.5*local:two)",
        "ties(0.5*local:one,0.5*local:two)",
        "ties[0.5](0.5*local:one,0.5*local:two)",
        "ties[0.0,total](0.5*local:one,0.5*local:two)",
        "ties[1.5,total](0.5*local:one,0.5*local:two)",
        "ties[0.5,majority](0.5*local:one,0.5*local:two)",
        "dare_linear[0.5,total](0.5*local:one,0.5*local:two)",
        "cat(0.5*local:one,0.5*local:two)",
        "linear(0.5*merged:one,0.5*local:two)",
        "linear(" + ",".join(["0.5*local:one"] * 17) + ")",
        "linear(0.5*local:one,0.5*local:" + "a" * MAX_LENGTH + ")",
    ],
)
def test_any_other_text_is_no_recipe(text: str) -> None:
    with pytest.raises(ValueError, match=r"[a-z]"):
        MergeRecipe.parse(text)


def test_only_merged_adapters_have_members() -> None:
    assert members_of(AdapterKey("local", "linear(0.5*local:one,0.5*local:two)")) == ()


def test_another_recipe_draws_other_numbers() -> None:
    seeds = {MergeRecipe(HALVES, strategy).seed for strategy in Strategy}
    assert len(seeds) == len(Strategy)
    assert all(0 <= seed < 1 << 63 for seed in seeds)
