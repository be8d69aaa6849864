"""Moves into the arena: bytes, table, order and failures."""

from __future__ import annotations

from threading import Event

import pytest
import torch

from lorafleet.cache.device_copies import Copies, Copy, copier_for
from lorafleet.cache.device_tier import ALIGNMENT, DeviceTier
from lorafleet.cache.host_memory import allocate
from lorafleet.cache.packed_form import PackedForm, plan_form
from lorafleet.cache.packing import PackedAdapter
from tests.cache.adapter_cases import tiny_layout

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
Q0, O1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"


def adapter(device: str, value: float, ranks: dict[str, int] | None = None) -> PackedAdapter:
    """Packed, with every element `value`."""
    form = plan_form(ranks or {Q0: 2, O1: 4}, tiny_layout(), 4)
    packed = allocate(form, torch.float32, pin=device == "cuda")
    packed.buffer.fill_(value)
    return packed


def open_tier(device: str, num_slots: int = 3) -> DeviceTier:
    return DeviceTier(1 << 16, num_slots, tiny_layout(), torch.float32, torch.device(device))


def drain(tier: DeviceTier, count: int) -> list[int]:
    """Takes ready slots until there are `count`."""
    ready: list[int] = []
    while len(ready) < count:
        ready += tier.take_ready()
    return ready


@pytest.mark.parametrize("device", DEVICES)
def test_a_slots_parts_are_read_in_the_arena_and_go_with_it(device: str) -> None:
    tier = open_tier(device)
    form = plan_form({Q0: 2}, tiny_layout(), 4, {"extra": (3, 5)})
    packed = allocate(form, torch.float32, pin=device == "cuda")
    packed.buffer.copy_(torch.arange(packed.buffer.numel()))
    with torch.inference_mode():
        tier.begin_move(packed, 2, 512)
        tier.wait({2})
        found = tier.parts(2)["extra"].cpu()
    start = form.parts[0].offset
    assert torch.equal(found, torch.arange(start, start + 15).view(3, 5).float())
    assert not tier.parts(0)
    with torch.inference_mode():
        tier.begin_move(adapter(device, 1.0), 2, 512)
        tier.wait({2})
    assert not tier.parts(2)


@pytest.mark.parametrize("device", DEVICES)
def test_a_scattered_move_brings_every_piece(device: str) -> None:
    """What a row names in the arena is what it names in the buffer."""
    tier, layout = open_tier(device), tiny_layout()
    form = plan_form({Q0: 3, O1: 7}, layout, 4, {"extra": (3, 5)})
    packed = allocate(form, torch.float32, pin=device == "cuda")
    packed.buffer.copy_(torch.arange(packed.buffer.numel()))
    o1 = form.rows[5]
    extents = [(4096, 4 * o1[0]), (512, 4 * (form.parts[0].offset - o1[0])), (256, 256)]
    with torch.inference_mode():
        tier.begin_scattered(packed, 2, extents)
        tier.wait({2})
        arena, table = tier.arena.cpu(), tier.table[2].tolist()
        extra = tier.parts(2)["extra"].cpu()
    for row, placed, site in zip(form.rows, table, layout.sites, strict=True):
        assert [placed[1], *placed[2::2]] == [row[1], *row[2::2]], "ranks stay"
        for start, there, length in [
            (row[0], placed[0], row[1] * site.in_local),
            *((row[3 + 2 * i], placed[3 + 2 * i], row[2 + 2 * i] * target.out_local)
              for i, target in enumerate(site.targets)),
        ]:  # fmt: skip
            assert torch.equal(arena[there : there + length], packed.buffer[start : start + length])
    assert table[5][0] == 128
    start = form.parts[0].offset
    assert torch.equal(extra, torch.arange(start, start + 15).view(3, 5).float())
    assert torch.equal(arena[64:79], extra.flatten())


@pytest.mark.parametrize("device", DEVICES)
def test_a_move_brings_bytes_and_rows(device: str) -> None:
    tier = open_tier(device)
    first, second = adapter(device, 1.0), adapter(device, 2.0, {O1: 7})
    with torch.inference_mode():  # as the worker calls it
        tier.begin_move(first, 1, 0)
        tier.begin_move(second, 3, first.nbytes)
        tier.wait({1, 3})
        seen = tier.arena[: first.buffer.numel() + second.buffer.numel()].cpu()
        table = tier.table.cpu()
    assert torch.equal(seen, torch.cat([first.buffer, second.buffer]))
    assert drain(tier, 2) == [1, 3]
    assert tier.take_ready() == []
    start = first.nbytes // 4
    assert table[1].tolist() == [list(row) for row in first.form.rows]
    placed = second.form.place([(start, second.form.num_elements)])
    assert table[3].tolist() == [list(row) for row in placed.rows]
    assert not table[0].any()
    assert not table[2].any()
    o_site = tier.site(5)
    assert torch.equal(o_site.table, tier.table[:, 5])
    weights = o_site.alone(3)
    assert weights.a is not None
    assert weights.b is not None
    assert weights.a.to_dense().cpu().eq(2).all()
    assert weights.a.shape == (7, 32)
    assert weights.b.shape == (32, 7)
    assert tier.site(0).alone(3).a is None


@pytest.mark.parametrize("device", DEVICES)
def test_the_last_move_of_a_slot_counts(device: str) -> None:
    tier = open_tier(device)
    site = tier.site(0)
    offset = 0
    for value in range(1, 20):
        packed = adapter(device, float(value), {Q0: 1 + value % 3})
        tier.begin_move(packed, 2, offset)
        tier.wait([2])
        weights = site.alone(2)
        assert weights.a is not None
        assert weights.a.shape[0] == 1 + value % 3
        assert weights.a.to_dense().cpu().eq(value).all()
        offset = (offset + packed.nbytes) % (1 << 15)
    assert drain(tier, 19) == [2] * 19


@pytest.mark.parametrize("device", DEVICES)
def test_wait_all_covers_every_slot(device: str) -> None:
    tier = open_tier(device)
    size = adapter(device, 0).nbytes
    for slot in (1, 2, 3):
        tier.begin_move(adapter(device, float(slot)), slot, slot * size)
    tier.wait_all()
    for slot in (1, 2, 3):
        weights = tier.site(0).alone(slot)
        assert weights.a is not None
        assert weights.a.to_dense().cpu().eq(slot).all()


class _HeldCopier:
    """Starts the real copies once `go` is set."""

    def __init__(self) -> None:
        self.go, self._real = Event(), copier_for(torch.device("cpu"))

    def start(self, copies: Copies) -> Copy:
        self._real._thread.submit(self.go.wait)  # type: ignore[attr-defined]
        return self._real.start(copies)


def test_ready_slots_are_those_that_are_done() -> None:
    tier, copier = open_tier("cpu"), _HeldCopier()
    tier._copier = copier
    tier.begin_move(adapter("cpu", 1.0), 1, 0)
    assert tier.take_ready() == []
    tier.wait([2, 3])  # not those: does not block
    copier.go.set()
    tier.wait([1])
    assert drain(tier, 1) == [1]


def test_a_failed_copy_raises_in_wait_and_take_ready() -> None:
    tier = open_tier("cpu")
    good = adapter("cpu", 1.0)
    short = PackedAdapter(PackedForm(good.form.rows, good.form.num_elements, 4), good.buffer[:-64])
    tier.begin_move(short, 1, 0)
    with pytest.raises(ValueError, match="broadcast"):
        tier.wait([1])
    with pytest.raises(ValueError, match="broadcast"):
        tier.wait_all()
    with pytest.raises(ValueError, match="broadcast"):
        drain(tier, 1)


@pytest.mark.parametrize(("slot", "offset"), [(0, 0), (4, 0), (1, 100), (1, 1 << 16)])
def test_moves_out_of_bounds_are_our_own_mistakes(slot: int, offset: int) -> None:
    assert ALIGNMENT == 256
    with pytest.raises(AssertionError):
        open_tier("cpu").begin_move(adapter("cpu", 1.0), slot, offset)


@needs_cuda
def test_cuda_moves_neither_wait_for_the_compute_nor_overtake_it() -> None:
    tier = open_tier("cuda")
    old, new = adapter("cuda", 1.0, {Q0: 8}), adapter("cuda", 2.0, {Q0: 8})
    tier.begin_move(old, 1, 0)
    tier.wait([1])
    torch.cuda.synchronize()
    assert tier.take_ready() == [1]
    torch.cuda._sleep(200_000_000)  # cycles: the compute is busy for about a tenth of a second
    compute = torch.cuda.Event()
    seen_old = tier.arena[: old.buffer.numel()].clone()
    compute.record()
    tier.begin_move(new, 1, 0)
    tier.wait([1])
    seen_new = tier.arena[: new.buffer.numel()].clone()
    assert not compute.query()  # nothing above made the host wait
    assert tier.take_ready() == []
    torch.cuda.synchronize()
    assert seen_old.eq(1).all()
    assert seen_new.eq(2).all()
    assert tier.take_ready() == [1]


@needs_cuda
def test_cuda_host_memory_is_page_locked_and_given_back() -> None:
    for _ in range(50):
        packed = adapter("cuda", 1.0)
        assert packed.buffer.is_pinned()
        del packed
