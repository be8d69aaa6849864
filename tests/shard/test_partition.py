"""Partition: the ranks' parts make up each linear, and nothing twice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lorafleet.shard.errors import UnsupportedModel
from lorafleet.shard.partition import Partition


def config(**changes: Any) -> Any:
    sizes = {
        "hidden_size": 64,
        "head_dim": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 259,
    }
    return SimpleNamespace(**sizes | changes)


def ranks(size: int, **changes: Any) -> list[Partition]:
    return [Partition.of(config(**changes), rank, size) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", ["q_proj", "k_proj", "gate_proj", "qkv_proj", "gate_up_proj"])
def test_column_parts_cover_the_outputs_once(name: str, size: int) -> None:
    targets = [part.target(f"model.layers.0.x.{name}") for part in ranks(size)]
    rows = [row for target in targets for start, stop in target.out_ranges
            for row in range(start, stop)]  # fmt: skip
    assert sorted(rows) == list(range(targets[0].out_features))
    assert all(target.in_local == 64 for target in targets)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", ["o_proj", "down_proj"])
def test_row_parts_cover_the_inputs_once(name: str, size: int) -> None:
    targets = [part.target(f"model.layers.0.x.{name}") for part in ranks(size)]
    columns = [column for target in targets for column in range(*target.in_range)]
    assert columns == list(range(targets[0].in_features))
    assert all(target.out_local == 64 for target in targets)


def test_ranks_share_a_head_when_there_are_fewer_than_ranks() -> None:
    heads = [part.target("k_proj").out_ranges for part in ranks(8, num_key_value_heads=2)]
    assert heads == [((0, 16),)] * 4 + [((16, 32),)] * 4


def test_a_fused_projection_is_cut_part_by_part() -> None:
    second = ranks(2)[1].target("qkv_proj")
    assert second.out_features == 128 + 2 * 64
    assert second.out_ranges == ((64, 128), (128 + 32, 128 + 64), (192 + 32, 192 + 64))


def test_the_last_rank_takes_what_is_left_of_the_vocabulary() -> None:
    assert [part.vocab_range for part in ranks(2)] == [(0, 130), (130, 259)]
    assert [part.vocab_range for part in ranks(4, vocab_size=5)] == [(0, 2), (2, 4), (4, 5), (5, 5)]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_attention_heads": 9}, "num_attention_heads 9 is not divisible by --num-shard 2"),
        ({"intermediate_size": 97}, "intermediate_size 97 is not divisible by --num-shard 2"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 cannot be shared by --num-shard 2"),
    ],
)
def test_what_does_not_divide_is_refused(changes: dict[str, int], sentence: str) -> None:
    with pytest.raises(UnsupportedModel, match=sentence):
        ranks(2, **changes)
