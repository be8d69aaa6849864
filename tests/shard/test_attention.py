"""Attention over pages that hold what others left behind a row's own keys."""

from __future__ import annotations

import pytest
import torch

from lorafleet.shard.attention import AttentionBatch, AttentionKind, PrefillSpan
from lorafleet.shard.config import PAGE_SIZE
from lorafleet.shard.kv_pool import KvPool

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
NAN = float("nan")


@pytest.fixture
def pool() -> KvPool:
    torch.manual_seed(0)
    pool = KvPool(1, 4, KV_HEADS, HEAD_DIM, torch.float32, torch.device("cpu"))
    for held in (pool.keys, pool.values):
        held.normal_()
    return pool


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("left", [NAN, float("inf"), 3e38])
def test_what_is_no_number_stays_with_its_row(
    pool: KvPool, side: str, left: float, softcap: float | None
) -> None:
    """A prompt of 5 in page 1, a decode of 20 in pages 2 and 3, one of 7 in page 4 beside it."""
    none = torch.empty(0, dtype=torch.int64)
    pages, lengths = torch.tensor([[2, 3], [4, 0]]), torch.tensor([20, 7])
    spans = [PrefillSpan(0, 5, 0, torch.tensor([1]))]
    query, kind = torch.randn(7, HEADS, HEAD_DIM), AttentionKind(0.3, None, softcap)

    def attended() -> torch.Tensor:
        return AttentionBatch(pool, none, spans, 5, pages, lengths).attend(0, query, kind)

    before, held = attended(), getattr(pool, side)[0]
    held[0] = left  # the page that stands where a shorter row has none
    for page, num_own in ((1, 5), (3, 20 - PAGE_SIZE), (4, 7)):
        held[page, num_own:] = left
    assert torch.equal(attended(), before)
    assert before.isfinite().all()
