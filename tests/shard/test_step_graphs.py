"""What a captured step is chosen by; the capture itself is tested on a device."""

from __future__ import annotations

import pytest

from lorafleet.shard.step_forms import token_counts
from lorafleet.shard.step_graphs import RANK_CLASSES, rank_class


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
