"""What a captured step is chosen by; the capture itself is tested on a device."""

from __future__ import annotations

import pytest

from lorafleet.shard.lora_class import (
    NO_LORA,
    RANK_CLASSES,
    LoraClass,
    decode_class,
    decode_classes,
    rank_class,
)
from lorafleet.shard.step_forms import token_counts


def test_token_counts_rise_to_the_largest_and_pad_little() -> None:
    sizes = token_counts(256)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == 256
    for rows in range(1, 257):
        padded = next(n for n in sizes if n >= rows)
        assert padded - rows <= max(8, rows // 4)


@pytest.mark.parametrize(("rank", "expected"), [(0, 0), (1, 16), (16, 16), (17, 64), (512, 512)])
def test_a_rank_is_captured_for_the_next_class(rank: int, expected: int) -> None:
    assert rank_class(rank) == expected
    assert list(RANK_CLASSES) == sorted(RANK_CLASSES)


@pytest.mark.parametrize(
    ("slots", "size", "rank", "expected"),
    [
        ([0] * 30, 32, 0, NO_LORA),
        ([5] * 64, 64, 16, LoraClass(16, is_few=True)),  # 8 groups of 8 tokens, one slot in each
        ([5] * 63 + [6], 64, 16, LoraClass(16)),  # two in the last
        ([5] * 30 + [0] * 33 + [6], 64, 8, LoraClass(16, is_few=True)),
        ([0] * 63 + [6], 64, 17, LoraClass(64)),  # more of x @ A^T than is carried
        ([5, 6, 5, 6], 4, 64, LoraClass(64, is_few=True)),
        ([5, 6, 7], 4, 64, LoraClass(64)),  # 4 times 16 ranks each
        ([5], 1, 512, LoraClass(512)),
        ([5] * 100, 112, 4, LoraClass(16)),
    ],
)
def test_few_slots_are_captured_apart(
    slots: list[int], size: int, rank: int, expected: LoraClass
) -> None:
    assert decode_class(slots, size, rank) == expected


def test_every_class_of_a_step_is_captured_before() -> None:
    for size in token_counts(256):
        captured = decode_classes(size)
        assert len(captured) == len(set(captured))
        mixes = [list(range(1, size + 1)), [1] * size, [1] + [0] * (size - 1), [1, 2] * (size // 2)]
        found = {decode_class(slots, size, rank) for slots in mixes for rank in (1, 16, 17, 64)}
        assert found | {NO_LORA} == set(captured)
