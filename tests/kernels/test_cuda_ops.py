"""The CUDA kernels against their plain-torch references, in fp16 and bf16."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from lorafleet.kernels.decode_attention import op as attention_op
from lorafleet.kernels.decode_attention.op import decode_attention
from lorafleet.kernels.decode_attention.reference import decode_attention as reference_attention
from lorafleet.kernels.fetch.op import fetch_
from lorafleet.kernels.fused import cuda as fused_cuda
from lorafleet.kernels.fused import reference as fused_reference
from lorafleet.kernels.fused.op import silu_product
from lorafleet.kernels.greedy.op import greedy
from lorafleet.kernels.linear import cuda as stream
from lorafleet.kernels.linear.op import linear
from lorafleet.kernels.lora.cuda import are_few, updated_silu
from lorafleet.kernels.lora.op import LoraBatch, Pending, lora_add_, lora_product
from lorafleet.kernels.lora.weights import SiteWeights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

NO_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9
DTYPES = [torch.bfloat16, torch.float16]
MIXED_RANKS = [(8, 8, 8), (1, 0, 0), (0, 4, 64), (16, 3, 5), (33, 33, 33), (512, 128, 1)]


class Site:
    """A site with adapters in its first slots; the rest of the arena is poison."""

    def __init__(
        self,
        in_features: int,
        outs: Sequence[int],
        ranks: Sequence[Sequence[int]],
        dtype: torch.dtype,
        num_slots: int = 70,
    ) -> None:
        rows: list[tuple[int, ...]] = [(0,) * 8]
        blocks, cursor = [], 0
        for per_target in ranks:
            row = [cursor, sum(per_target)]
            sizes = [sum(per_target) * in_features]
            sizes += [rank * out for rank, out in zip(per_target, outs, strict=True)]
            for index, size in enumerate(sizes):
                if index:
                    row += [per_target[index - 1], cursor]
                padded = -(-size // 128) * 128
                block = torch.full((padded,), float("nan"))
                block[:size] = torch.randn(size) / 8
                blocks.append(block)
                cursor += padded
            rows.append(tuple((row + [0] * 8)[:8]) if sum(per_target) else (0,) * 8)
        rows += [(0,) * 8] * (num_slots + 1 - len(rows))
        self.ranks, self.outs, self.dtype = list(ranks), list(outs), dtype
        arena = torch.cat(blocks).to(dtype).cuda()
        table = torch.zeros(num_slots + 1, 3, 8, dtype=torch.int64)  # this site is the middle one
        table[:, 1] = torch.tensor(rows)
        self.weights = SiteWeights(arena, table.cuda()[:, 1], rows, in_features, outs)
        self.max_rank = max(max(per_target) for per_target in ranks)

    def expected(self, x: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        """float64 update [num_tokens, sum(outs)]."""
        result = torch.zeros(len(slots), sum(self.outs), dtype=torch.float64, device="cuda")
        for slot in {slot for slot in slots if slot and slot <= len(self.ranks)}:
            picked = torch.tensor([s == slot for s in slots], device="cuda")
            a_offset, _, *pairs = self.weights.rows[slot]
            start = 0
            for out, rank, b_offset in zip(self.outs, pairs[::2], pairs[1::2], strict=False):
                a = self._block(a_offset, rank, x.shape[1])
                h = (x[picked].double() @ a.T).to(x.dtype).double()
                result[picked, start : start + out] = h @ self._block(b_offset, rank, out)
                a_offset, start = a_offset + rank * x.shape[1], start + out
        return result

    def _block(self, offset: int, rows: int, columns: int) -> torch.Tensor:
        return self.weights.arena[offset : offset + rows * columns].view(rows, columns).double()


def batch_of(slots: Sequence[int], max_rank: int) -> LoraBatch:
    segments, start = [], 0
    for index in range(1, len(slots) + 1):
        if index == len(slots) or slots[index] != slots[start]:
            if slots[start]:
                segments.append((slots[start], start, index))
            start = index
    row_slots = torch.tensor(slots, dtype=torch.int32, device="cuda")
    return LoraBatch(row_slots, tuple(segments), max_rank)


def poison() -> None:
    """What the next allocations find is not zero."""
    junk = [torch.full((1 << 22,), float("nan"), device="cuda") for _ in range(4)]
    del junk


def check(site: Site, slots: Sequence[int], dtype: torch.dtype) -> None:
    in_features = site.weights.in_features
    x = torch.randn(len(slots), in_features, device="cuda").to(dtype)
    before = torch.randn(len(slots), sum(site.outs), device="cuda").to(dtype)
    batch, y = batch_of(slots, site.max_rank), before.clone()
    poison()
    lora_add_(y, x, site.weights, batch)
    expected = site.expected(x, slots)
    base = torch.tensor([s == 0 for s in slots], device="cuda")
    assert torch.equal(y[base], before[base])
    error = (y.double() - before.double() - expected)[~base]
    if len(error):  # y itself is rounded: that error is not the op's
        rounding = 2**-8 if dtype == torch.bfloat16 else 2**-11
        allowed = 5e-3 * expected[~base].norm() + rounding * y[~base].double().norm()
        assert error.norm() <= allowed, (error.norm(), expected.norm())


BATCHES = {
    "one row": [1],
    "distinct": [1, 2, 3, 4, 5, 6],
    "base between": [1, 1, 0, 0, 3, 3, 0, 4],
    "unsorted": [3, 1, 3, 2, 1, 1, 5, 0, 5, 6, 1],
    "a run over the group's edge": [0] * 5 + [4] * 14 + [6] * 3,
    "one without weights here": [7, 7, 2],
    "256 rows": sorted([i % 6 + 1 for i in range(250)] + [0] * 6),
    "prefill": [1] * 100 + [6] * 130 + [0] * 9 + [3] * 70 + [2] + [5] * 40,
    "prefill and decode": [4] * 512 + [1] * 65 + [2, 3, 0, 5, 5, 6],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(("in_features", "outs"), [(256, (264, 64, 64)), (4096, (1024, 512, 512))])
def test_lora_with_mixed_ranks(
    slots: list[int], in_features: int, outs: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(len(slots))
    check(Site(in_features, outs, MIXED_RANKS, dtype), slots, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [4, 8, 16, 64])
@pytest.mark.parametrize("popularity", ["distinct", "uniform", "zipf", "identical"])
def test_lora_by_popularity(popularity: str, rank: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    slots = {
        "distinct": list(range(1, 65)),
        "uniform": sorted([i % 8 + 1 for i in range(64)]),
        "zipf": [1] * 24 + [2] * 12 + [3] * 8 + [4] * 6 + list(range(5, 19)),
        "identical": [1] * 64,
    }[popularity]
    for in_features, outs in [(1024, (1024,)), (512, (1536, 1536)), (1536, (512,))]:
        ranks = [(rank,) * len(outs)] * max(slots)
        check(Site(in_features, outs, ranks, dtype), slots, dtype)


@pytest.mark.skipif(NO_HOPPER, reason="needs the copy engine of Hopper")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 8, 13, 16, 32, 40, 64])
@pytest.mark.parametrize(
    ("wide", "outs"), [(64, 24), (72, 128), (512, 1000), (4096, 6144), (14336, 4096), (320, 40008)]
)
def test_stream_linear(rows: int, wide: int, outs: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, wide, device="cuda").to(dtype)
    weight = torch.randn(outs, wide, device="cuda").to(dtype)
    assert stream.supports(x, weight)
    for bias in (None, torch.randn(outs, device="cuda").to(dtype)):
        poison()
        found = [stream.linear(x, weight, bias) for _ in range(3)]
        expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        assert (found[0].double() - expected).norm() <= 3e-3 * expected.norm()
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@pytest.mark.skipif(NO_HOPPER, reason="needs the copy engine of Hopper")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 13, 16, 32, 40, 64])
@pytest.mark.parametrize(("wide", "width"), [(64, 8), (72, 72), (4096, 3072), (512, 14336)])
def test_a_gated_product_is_the_product_and_then_silu(
    rows: int, wide: int, width: int, dtype: torch.dtype
) -> None:
    x = torch.randn(rows, wide, device="cuda").to(dtype)
    weight = (torch.randn(2 * width, wide, device="cuda") / wide**0.5).to(dtype)
    assert stream.supports_gated(x, weight)
    for bias in (None, torch.randn(2 * width, device="cuda").to(dtype)):
        poison()
        found = [stream.linear(x, weight, bias, is_gated=True) for _ in range(3)]
        expected = fused_cuda.silu_mul(stream.linear(x, weight, bias))
        assert torch.equal(found[0], expected)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    "slots", [[1], [1, 2, 3, 4, 5, 6, 0], [3] * 6 + [0, 5], [2] * 70 + [0] * 30 + [6, 4]]
)
def test_a_product_and_what_is_pending_make_the_whole(slots: list[int]) -> None:
    site = Site(1024, (256, 128, 128), MIXED_RANKS, torch.bfloat16)
    x = torch.randn(len(slots), 1024, device="cuda").bfloat16()
    weight = torch.randn(512, 1024, device="cuda").bfloat16()
    batch = batch_of(slots, site.max_rank)
    found, pending = lora_product(x, weight, None, site.weights, batch)
    assert pending is not None
    pending.add_(found)
    expected = linear(x, weight)
    lora_add_(expected, x, site.weights, batch)
    assert torch.equal(found, expected)


FEW = {
    "one row": (MIXED_RANKS[:5], [4]),
    "no adapter": (MIXED_RANKS[:5], [0] * 7),
    "one row of many ranks": ([(128, 3)], [1]),
    "ranks of few more than 16": ([(17, 3), (3, 17)], [1, 0, 1, 0, 0, 0, 0, 2, 1, 1]),
    "base between": ([(8, 8), (1, 0), (0, 16), (16, 3)], [0, 0, 1, 0, 2, 3, 3, 0, 4, 0]),
    "unsorted": ([(8, 16), (11, 11), (5, 1)], [3, 1, 3, 2, 1, 1, 0, 3, 2, 1, 1, 0, 3, 2, 2, 1]),
    "one shared": ([(16, 16)], [1] * 40),
    "one of all": ([(16, 16)], [1] * 64),
    "over the group's edge": ([(16, 9), (9, 16)], [0] * 5 + [1] * 14 + [2] * 30),
    "one without weights here": ([(16, 16)], [2] * 9 + [1]),
    "distinct": ([(16, 16), (12, 9)] * 4, list(range(1, 9))),
    "the last of many": ([(16, 16)], [0] * 63 + [1]),
    "16 rows of many ranks": ([(64, 49), (33, 64)], [1] * 8 + [2] * 8),
}


@pytest.mark.skipif(NO_HOPPER, reason="needs the copy engine of Hopper")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ranks", "slots"), FEW.values(), ids=FEW)
@pytest.mark.parametrize(("wide", "width"), [(64, 8), (72, 136), (4096, 14336), (4096, 1792)])
@pytest.mark.parametrize("is_one_target", [False, True])
def test_a_gated_product_of_few_slots_adds_its_update(
    is_one_target: bool,
    wide: int,
    width: int,
    ranks: list[tuple[int, ...]],
    slots: list[int],
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(wide + len(slots))
    outs = (2 * width,) if is_one_target else (width, width)
    site = Site(wide, outs, [each[: len(outs)] for each in ranks], dtype, num_slots=10)
    x = torch.randn(len(slots), wide, device="cuda").to(dtype)
    weight = (torch.randn(2 * width, wide, device="cuda") / wide**0.5).to(dtype)
    row_slots = torch.tensor(slots, dtype=torch.int32, device="cuda")
    groups = {(token // 8, slot) for token, slot in enumerate(slots) if slot}
    assert are_few(len(slots), len(groups), site.max_rank)
    base = torch.tensor([slot == 0 for slot in slots], device="cuda")
    for bias in (None, torch.randn(2 * width, device="cuda").to(dtype)):
        poison()
        work = (x, weight, bias, site.weights, row_slots, site.max_rank)
        found = [updated_silu(*work) for _ in range(3)]
        product = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        gate, up = (product + site.expected(x, slots)).chunk(2, dim=1)
        expected = torch.nn.functional.silu(gate) * up
        error = (found[0].double() - expected).norm(dim=1)
        assert (error <= 2e-2 * expected.norm(dim=1)).all(), error / expected.norm(dim=1)
        alone = stream.linear(x, weight, bias, is_gated=True)
        assert torch.equal(found[0][base], alone[base])
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@pytest.mark.skipif(NO_HOPPER, reason="needs the copy engine of Hopper")
@pytest.mark.parametrize(
    ("rows", "max_rank"), [(1, 16), (16, 16), (16, 64), (32, 16), (40, 16), (64, 16)]
)
def test_updates_in_a_captured_line_serve_every_mix_of_few(rows: int, max_rank: int) -> None:
    """Each launch begins before the one in front has ended, whose shrink it has to wait for."""
    hidden, wide, ranks = 1024, 4096, [(16, max_rank), (3, 8), (0, 16), (max_rank, 0)]
    up = Site(hidden, (wide, wide), ranks, torch.bfloat16)
    down = Site(wide, (hidden,), [each[:1] for each in ranks], torch.bfloat16)
    weights = torch.randn(2 * wide, hidden, device="cuda").bfloat16() / 32
    backs = torch.randn(hidden, wide, device="cuda").bfloat16() / 64
    norm = torch.ones(hidden, device="cuda").bfloat16()
    start = torch.randn(rows, hidden, device="cuda").bfloat16()
    row_slots = torch.zeros(rows, dtype=torch.int32, device="cuda")
    batch = LoraBatch.captured(row_slots, max_rank, is_few=True)

    def run(pause: Callable[[], None]) -> torch.Tensor:
        residual, x = start.clone(), start
        for _ in range(12):
            gated = silu_product(x, weights, None, (up.weights, batch))
            pause()
            product, pending = lora_product(gated, backs, None, down.weights, batch)
            pause()
            x = fused_cuda.rms_norm(product, residual, norm, 1e-5, pending)
            pause()
        return x

    run(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(lambda: None)
    mixes = [[0] * rows, [1] * rows, [i // 8 % 5 for i in range(rows)]]
    for slots in (*mixes, [4 - i // 8 % 3 for i in range(rows)]):
        row_slots.copy_(torch.tensor(slots, dtype=torch.int32))
        expected = run(torch.cuda.synchronize)
        for _ in range(10):
            captured.zero_()
            graph.replay()
            assert torch.equal(captured, expected)
            assert torch.equal(run(lambda: None), expected)


def test_a_shrink_beside_a_long_product_is_waited_for() -> None:
    """Each product's input is overwritten as soon as the stream allows."""
    site = Site(4096, (128, 64, 64), MIXED_RANKS, torch.bfloat16)
    slots = [1] * 900 + [0] * 300 + [4] * 1000 + [5] * 848
    batch = batch_of(slots, site.max_rank)
    x = torch.randn(len(slots), 4096, device="cuda").bfloat16()
    weight = torch.randn(256, 4096, device="cuda").bfloat16() / 64
    expected = linear(x, weight)
    lora_add_(expected, x, site.weights, batch)
    used = x.clone()
    for _ in range(30):
        used.copy_(x)
        y, pending = lora_product(used, weight, None, site.weights, batch)
        assert pending is not None
        pending.add_(y)
        used.zero_()
        assert torch.equal(y, expected)


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_a_line_of_launches_that_overlap_gives_what_single_ones_give(rows: int) -> None:
    """Each kernel begins before the one in front of it has ended; nothing may be read too early."""
    hidden, wide = 1024, 4096
    up = torch.randn(2 * wide, hidden, device="cuda").bfloat16() / 32
    down = torch.randn(hidden, wide, device="cuda").bfloat16() / 64
    norm = torch.ones(hidden, device="cuda").bfloat16()
    start = torch.randn(rows, hidden, device="cuda").bfloat16()

    def run(pause: Callable[[], None]) -> torch.Tensor:
        residual, x = start.clone(), start
        for i in range(12):
            gated = silu_product(x, up) if i % 2 else fused_cuda.silu_mul(linear(x, up))
            pause()
            product = linear(gated, down)
            pause()
            x = fused_cuda.rms_norm(product, residual, norm, 1e-5)
            pause()
        return x

    expected = run(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(lambda: None)
    for _ in range(20):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)
        assert torch.equal(run(lambda: None), expected)


@pytest.mark.parametrize("length", [1, 17, 64, 65, 1000, 8192])
def test_lora_prefill_of_one_long_segment(length: int) -> None:
    check(Site(512, (512, 128, 128), [(16, 16, 16)], torch.bfloat16), [1] * length, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", [8, 264, 4104, 14336])
@pytest.mark.parametrize("outs", [(72,), (200, 8)])
@pytest.mark.parametrize(
    "ranks", [(1, 7, 16), (15, 17, 32), (8, 33, 48), (49, 24, 64), (65, 100, 3)]
)
def test_lora_prefill_at_the_edges_of_rank_groups(
    ranks: Sequence[int], outs: tuple[int, ...], in_features: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    site = Site(in_features, outs, [(rank,) * len(outs) for rank in ranks], dtype)
    check(site, [1] * 17 + [2] * 65 + [0] * 5 + [3] * 141 + [1] * 7 + [2] * 33, dtype)


def test_lora_in_a_captured_graph_serves_every_mix() -> None:
    site = Site(512, (256, 128, 128), MIXED_RANKS, torch.bfloat16)
    x = torch.randn(16, 512, device="cuda").bfloat16()
    y = torch.zeros(16, 512, device="cuda").bfloat16()
    row_slots = torch.zeros(16, dtype=torch.int32, device="cuda")
    batch = LoraBatch.captured(row_slots, 512)

    def run() -> None:
        y.zero_()
        lora_add_(y, x, site.weights, batch)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for slots in ([0] * 16, [1] * 16, list(range(7)) + [6] * 9, [5, 0, 3, 3, 3, 1, 2, 6] * 2):
        row_slots.copy_(torch.tensor(slots, dtype=torch.int32))
        graph.replay()
        replayed = y.clone()
        run()
        assert torch.equal(replayed, y)
        error = (y.double() - site.expected(x, slots)).norm()
        assert error <= 1e-2 * site.expected(x, slots).norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 2, 64), (32, 8, 128), (8, 8, 128), (8, 1, 64)]
)
@pytest.mark.parametrize(
    ("positions", "window", "softcap"),
    [
        ([0], None, None),
        ([15, 16, 17, 100, 0], None, 30.0),
        ([600] * 3 + [1, 2047], None, None),
        ([600, 5, 40, 39, 64], 40, None),
        (list(range(3, 900, 14)), 512, None),
        ([0, 15, 16, 31, 32, 33, 48, 2047] * 9, None, 30.0),
    ],
)
def test_decode_attention(
    positions: list[int],
    window: int | None,
    softcap: float | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    num_rows, max_pages = len(positions), 128
    keys, values = torch.randn(2, 700, 16, kv_heads, head_dim, device="cuda").to(dtype)
    page_table = torch.randint(0, 700, (num_rows + 5, max_pages), device="cuda")
    rows = torch.randperm(num_rows + 5, device="cuda")[:num_rows]
    query = torch.randn(num_rows, heads, head_dim, device="cuda").to(dtype)
    places = torch.tensor(positions, device="cuda")
    fresh = (places - torch.randint(0, 50, (num_rows,), device="cuda")).clamp(min=0)
    arrived = torch.zeros(num_rows * kv_heads, dtype=torch.int32, device="cuda")
    scale = head_dim**-0.5
    poison()
    found = [
        decode_attention(
            query, keys, values, page_table, rows, places, fresh, arrived, scale, window, softcap
        )
        for _ in range(3)
    ]
    expected = reference_attention(
        query, keys, values, page_table, rows, places, scale, window, softcap
    )
    assert (found[0].float() - expected).norm() <= 8e-3 * expected.norm()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not arrived.any()


def test_decode_attention_in_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an L4 has it: blocks of two warps for few rows too."""
    monkeypatch.setattr(attention_op, "shared_bytes", lambda device: 99 << 10)
    for positions in ([0], [600, 5, 40, 2047]):
        test_decode_attention(positions, None, 30.0, 8, 2, 128, torch.bfloat16)


@pytest.mark.parametrize("bytes_", [8, 16, 7 * 8 * 64, 8 * 4096 + 5])
def test_fetch_copies_every_byte(bytes_: int) -> None:
    source = torch.randint(0, 255, (bytes_,), dtype=torch.uint8).pin_memory()
    to = torch.zeros(bytes_ + 16, dtype=torch.uint8, device="cuda")
    fetch_(to[:bytes_], source)
    assert torch.equal(to[:bytes_].cpu(), source)
    assert not to[bytes_:].any()


PENDING_SLOTS = [
    [1],
    [0, 0, 1],
    [2, 1, 0, 3, 5, 0, 4],
    [4] * 9 + [0] * 3 + [5] * 2,
    [1, 2] * 20,
    [1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0, 1, 3, 5, 2],
    [3] * 40 + [0] * 70 + [5] * 65 + [1, 2, 0, 4],
    [6] * 37 + [4] * 21 + [2] * 100 + [0] * 3 + [1] * 16,
]


def begin(site: Site, slots: Sequence[int]) -> Pending:
    """What a product of these rows' adapters lacks."""
    x = torch.randn(len(slots), site.weights.in_features, device="cuda").to(site.dtype)
    batch = batch_of(slots, site.max_rank)
    _, pending = lora_product(x, torch.zeros(8, x.shape[1]).to(x), None, site.weights, batch)
    assert pending is not None
    poison()
    return pending


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", [slots for slots in PENDING_SLOTS if len(slots) < 100])
@pytest.mark.parametrize("hidden", [264, 4096, 8192])
def test_a_norm_adds_what_is_pending(hidden: int, slots: list[int], dtype: torch.dtype) -> None:
    site = Site(256, (hidden,), [(8,), (1,), (16,), (3,), (16,)], dtype)
    pending = begin(site, slots)
    if not fused_cuda.norms_pending(torch.empty(1, hidden, device="cuda", dtype=dtype), pending):
        assert NO_HOPPER
        pytest.skip("rows are not shared between blocks")
    x, residual = torch.randn(2, len(slots), hidden, device="cuda").to(dtype)
    weight, expected_residual = torch.randn(hidden, device="cuda").to(dtype), residual.clone()
    found = fused_cuda.rms_norm(x, residual, weight, 1e-5, pending)
    pending.add_(x)
    _close(found, fused_reference.add_rms_norm_(x, expected_residual, weight, 1e-5))
    _close(residual, expected_residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", PENDING_SLOTS)
@pytest.mark.parametrize("width", [96, 1536, 14336])
@pytest.mark.parametrize("is_one_target", [False, True])
def test_silu_mul_adds_what_is_pending(
    width: int, slots: list[int], is_one_target: bool, dtype: torch.dtype
) -> None:
    outs = (2 * width,) if is_one_target else (width, width)
    site = Site(256, outs, [ranks[: len(outs)] for ranks in MIXED_RANKS], dtype)
    pending = begin(site, slots)
    gate_up = torch.randn(len(slots), 2 * width, device="cuda").to(dtype)
    found = fused_cuda.silu_mul(gate_up, pending)
    pending.add_(gate_up)
    _close(found, fused_reference.silu_mul(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", PENDING_SLOTS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(4, 2, 64), (32, 8, 128), (5, 1, 96), (3, 3, 16), (3, 1, 256), (3, 3, 128)],
)
def test_rotary_adds_what_is_pending(
    heads: int, kv_heads: int, head_dim: int, slots: list[int], dtype: torch.dtype
) -> None:
    outs = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    site = Site(256, outs, MIXED_RANKS, dtype)
    pending = begin(site, slots)
    tokens = len(slots)
    qkv = torch.randn(tokens, sum(outs), device="cuda").to(dtype)
    cos, sin = torch.randn(2, tokens, head_dim, device="cuda").to(dtype)
    locations = torch.randperm(256, device="cuda")[:tokens]
    pools = torch.zeros(2, 2, 16, 16, kv_heads, head_dim, device="cuda", dtype=dtype)
    if not fused_cuda.rotates_pending(pools[0, 0], pending):
        pytest.skip("heads that tiles do not hold whole")
    found = fused_cuda.rotary_and_store_(
        qkv, cos, sin, pools[0, 0], pools[0, 1], locations, None, None, 1e-6, pending
    )
    pending.add_(qkv)
    expected = fused_reference.rotary_and_store_(
        qkv, cos, sin, pools[1, 0], pools[1, 1], locations, None, None, 1e-6
    )
    _close(found, expected)
    _close(pools[0], pools[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 64, 700])
@pytest.mark.parametrize("hidden", [64, 256, 4096, 5120, 16384])
def test_norms(rows: int, hidden: int, dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, rows, hidden, device="cuda").to(dtype)
    weight = torch.randn(hidden, device="cuda").to(dtype)
    expected_residual = residual.clone()
    expected = fused_reference.add_rms_norm_(x, expected_residual, weight, 1e-5)
    found = fused_cuda.rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, expected_residual)
    _close(found, expected)
    _close(fused_cuda.rms_norm(None, residual, weight, 1e-5), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 96), (5, 1536), (64, 14336), (1000, 512)])
def test_silu_mul(rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = (3 * torch.randn(rows, 2 * width, device="cuda")).to(dtype)
    _close(fused_cuda.silu_mul(gate_up), fused_reference.silu_mul(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim"),
    [(4, 2, 64, 64), (32, 8, 128, 128), (5, 1, 96, 48)],
)
def test_rotary(
    heads: int, kv_heads: int, head_dim: int, rotary_dim: int, normed: bool, dtype: torch.dtype
) -> None:
    tokens = 13
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device="cuda").to(dtype)
    cos, sin = torch.randn(2, tokens, rotary_dim, device="cuda").to(dtype)
    q_norm, k_norm = (
        torch.randn(head_dim, device="cuda").to(dtype) if normed else None for _ in range(2)
    )
    locations = torch.randperm(64, device="cuda")[:tokens]
    pools = torch.zeros(2, 2, 4, 16, kv_heads, head_dim, device="cuda", dtype=dtype)
    found = fused_cuda.rotary_and_store_(
        qkv.clone(), cos, sin, pools[0, 0], pools[0, 1], locations, q_norm, k_norm, 1e-6
    )
    expected = fused_reference.rotary_and_store_(
        qkv.clone(), cos, sin, pools[1, 0], pools[1, 1], locations, q_norm, k_norm, 1e-6
    )
    _close(found, expected)
    _close(pools[0], pools[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 128256), (5, 300), (64, 32000), (3, 4096)])
def test_greedy(rows: int, vocab: int, dtype: torch.dtype) -> None:
    logits = (4 * torch.randn(rows, vocab, device="cuda")).to(dtype)
    arrived = torch.zeros(rows, dtype=torch.int32, device="cuda")
    table = torch.full((3 * rows,), -7, device="cuda")
    places = torch.randperm(3 * rows, device="cuda")[:rows]
    if rows > 2:
        logits[1, 7] = float("nan")
        logits[2, 3] = logits[2].max()  # of equal ones the first
    for _ in range(2):
        poison()
        tokens, logprobs = greedy(logits, arrived, table, places)
        assert torch.equal(table[places], tokens.clamp(min=0))
        best = logits.float().max(dim=-1).values
        expected = best - logits.float().logsumexp(-1)
        for row in range(rows):
            if rows > 2 and row == 1:
                assert tokens[row] == -1
                continue
            assert tokens[row] == int((logits[row] == best[row].to(dtype)).nonzero()[0])
            torch.testing.assert_close(logprobs[row], expected[row], atol=1e-4, rtol=1e-4)
        assert not arrived.any()


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of float32 sums: a unit or two in the last place of the dtype."""
    step = 2**-7 if found.dtype == torch.bfloat16 else 2**-10
    torch.testing.assert_close(found.float(), expected.float(), rtol=2 * step, atol=2 * step)
