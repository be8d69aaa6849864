"""lora_add_ against the float32 reference, over mixed ranks, targets and segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafleet.kernels.lora import op, weights
from lorafleet.kernels.lora.op import LoraBatch, lora_add_
from lorafleet.kernels.lora.reference import lora_reference
from lorafleet.kernels.lora.weights import SiteWeights

IN, OUTS = 24, (16, 8, 8)
EMPTY = (0,) * 8


@dataclass
class Arena:
    """Adapters of one site, placed one behind the other."""

    num_slots: int
    dtype: torch.dtype = torch.float32
    rows: list[tuple[int, ...]] = field(init=False)
    used: int = 0

    def __post_init__(self) -> None:
        self.rows = [EMPTY] * (self.num_slots + 1)
        self.data = torch.full((1 << 17,), float("nan"), dtype=self.dtype)  # unused bytes poison
        self.table = torch.zeros(self.num_slots + 1, 8, dtype=torch.int64)
        self.site = SiteWeights(self.data, self.table, self.rows, IN, OUTS)

    def put(self, slot: int, ranks: Sequence[int], scale: float = 1.0) -> None:
        """Binds a random adapter of these ranks, one per target."""
        row = [self._block(sum(ranks) * IN, scale), sum(ranks)]
        for rank, width in zip(ranks, OUTS, strict=True):
            row += [rank, self._block(rank * width, scale)]
        self.rows[slot] = tuple(row) if sum(ranks) else EMPTY
        self.table[slot] = torch.tensor(self.rows[slot])

    def _block(self, count: int, scale: float) -> int:
        start, self.used = self.used, self.used + count
        self.data[start : self.used] = torch.randn(count) * scale / 4
        return start


def batch_of(slots: Sequence[int]) -> LoraBatch:
    """The batch of these tokens, segments read off as the shard does."""
    segments, start = [], 0
    for index in range(1, len(slots) + 1):
        if index == len(slots) or slots[index] != slots[start]:
            if slots[start]:
                segments.append((slots[start], start, index))
            start = index
    return LoraBatch(torch.tensor(slots, dtype=torch.int32), tuple(segments))


def run(arena: Arena, slots: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y before, y after, and what it should be."""
    x = torch.randn(len(slots), IN).to(arena.dtype)
    y = torch.randn(len(slots), sum(OUTS)).to(arena.dtype)
    batch, after = batch_of(slots), y.clone()
    lora_add_(y.clone(), x, arena.site, batch)  # the second time in a row may take another form
    lora_add_(after, x, arena.site, batch)
    return y, after, lora_reference(y, x, arena.site, batch.row_slots)


def choose(form: str, patch: pytest.MonkeyPatch) -> None:
    """Makes the op take one of its forms wherever it can, whatever that costs."""
    patch.setattr(op, "_MAX_GRID_ROWS", 0 if form == "by segment" else 1 << 30)
    patch.setattr(op, "_MAX_PADDING", 1 << 30)
    patch.setattr(weights, "_MAX_PADDING", 1 << 30)


@pytest.fixture(params=["by segment", "stacked"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms of the op."""
    choose(request.param, monkeypatch)
    return str(request.param)


BATCHES = {
    "one row": [1],
    "one adapter": [1] * 7,
    "distinct": [1, 2, 3, 4, 5, 6],
    "base beside": [0, 0, 0, 2, 2, 5],
    "base between": [1, 1, 0, 0, 3, 3],
    "prefill then decode": [1] * 9 + [3] * 4 + [0, 0, 1, 3, 3, 6],
    "one without weights here": [1, 1, 7, 7, 2],
    "only one without weights here": [7, 7, 7],
}


@pytest.mark.parametrize("slots", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_reference(form: str, slots: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    arena = Arena(7, dtype)
    for slot, ranks in enumerate([(8, 8, 8), (1, 0, 0), (0, 4, 64), (0, 0, 1), (64, 64, 64)], 1):
        arena.put(slot, ranks)
    arena.put(6, (3, 5, 0))
    before, after, expected = run(arena, slots)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(after.float(), expected, atol=tolerance, rtol=tolerance)
    base = torch.tensor(slots) == 0
    assert torch.equal(after[base], before[base])


def test_no_segments_is_no_work() -> None:
    y = torch.randn(3, sum(OUTS))
    before = y.clone()
    arena = Arena(1)
    lora_add_(y, torch.randn(3, IN), arena.site, LoraBatch.none(torch.device("cpu")))
    lora_add_(y, torch.randn(3, IN), arena.site, batch_of([0, 0, 0]))
    assert torch.equal(y, before)


def test_a_slot_that_is_written_again_is_read_again(form: str) -> None:
    arena = Arena(2)
    arena.put(1, (4, 4, 4))
    arena.put(2, (2, 0, 0))
    for ranks in [(4, 4, 4), (4, 4, 4), (0, 0, 0), (1, 8, 0)]:
        _, after, expected = run(arena, [1, 1, 2])
        torch.testing.assert_close(after, expected)
        arena.put(1, ranks)
    _, after, expected = run(arena, [1, 1, 2])
    torch.testing.assert_close(after, expected)


def test_another_adapters_overflow_stays_its_own(form: str) -> None:
    arena = Arena(2)
    arena.put(1, (4, 4, 4))
    arena.put(2, (4, 4, 4), scale=1e38)
    _, after, expected = run(arena, [1, 2])
    assert not torch.isfinite(after[1]).all()
    torch.testing.assert_close(after[0], expected[0])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_both_forms_agree_through_moves_and_batches(data: st.DataObject) -> None:
    arena, ranks = Arena(5), st.sampled_from([0, 1, 4, 16])
    for _ in range(data.draw(st.integers(1, 5))):
        for slot in data.draw(st.sets(st.integers(1, 5), max_size=3)):
            arena.put(slot, data.draw(st.tuples(ranks, ranks, ranks)))
        slots = sorted(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=12)))
        results = []
        for name in ("by segment", "stacked"):
            torch.manual_seed(1)
            with pytest.MonkeyPatch.context() as patch:
                choose(name, patch)
                _, after, expected = run(arena, slots)
            torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-4)
            results.append(after)
        torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


def test_copies_of_single_slots_are_bounded() -> None:
    arena = Arena(200)
    for slot in range(1, 201):
        arena.put(slot, (1, 1, 1))
        assert arena.site.alone(slot) is arena.site.alone(slot)
    assert len(arena.site._alone) <= 64


def test_a_stack_is_made_for_slots_that_last() -> None:
    arena = Arena(3)
    for slot in (1, 2, 3):
        arena.put(slot, (4, 4, 4))
    assert arena.site.stack((1, 2)) is None
    first = arena.site.stack((1, 2))
    assert first is not None
    assert arena.site.stack((1, 2)) is first
    arena.put(3, (8, 8, 8))
    assert arena.site.stack((1, 2)) is first
    arena.put(2, (4, 4, 4))
    assert arena.site.stack((1, 2)) is not first
    assert arena.site.stack((1, 3)) is None


def test_ranks_that_differ_too_much_are_not_stacked() -> None:
    arena = Arena(3)
    for slot, rank in enumerate((1, 1, 64), 1):
        arena.put(slot, (rank, 0, 0))
    for slots, is_stacked in {(1, 2): True, (1, 2, 3): False}.items():
        arena.site.stack(slots)
        assert (arena.site.stack(slots) is not None) == is_stacked
