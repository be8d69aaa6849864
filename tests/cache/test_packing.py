"""The packed buffer: its arithmetic, its content, and what is refused while it is filled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorafleet.cache.adapter_files import read_spec
from lorafleet.cache.errors import AdapterUnservable, SourceUnavailable
from lorafleet.cache.host_memory import allocate
from lorafleet.cache.packed_form import ALIGNMENT, EMPTY_ROW, plan_form
from lorafleet.cache.packing import PackedAdapter, pack
from lorafleet.cache.parts import PartSpec
from tests.cache.adapter_cases import LAYERS, config_of, tensors_of, tiny_layout, write_adapter

Q0, K0 = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


def pack_directory(
    directory: Path, dtype: torch.dtype = torch.float32, rank: int = 0, world: int = 1
) -> PackedAdapter:
    layout = tiny_layout(rank, world)
    spec = read_spec(directory, layout)
    packed = allocate(spec.form(layout, dtype.itemsize), dtype, pin=False)
    pack(spec, layout, packed, lambda done: None)
    return packed


def test_blocks_are_aligned_and_ranks_are_true() -> None:
    form = plan_form({Q0: 3, K0: 5}, tiny_layout(), 2)
    a, total, rank_0, b_0, rank_1, b_1, rank_2, b_2 = form.rows[0]
    assert (total, rank_0, rank_1, rank_2) == (8, 3, 5, 0)
    assert (a, b_0, b_1, b_2) == (0, 256, 384, 0)  # 8 x 32, then 3 x 32 in 128s, elements
    assert form.rows[1:] == (EMPTY_ROW,) * (4 * LAYERS - 1)
    assert form.nbytes == (384 + 128) * 2
    assert form.nbytes % ALIGNMENT == 0


def test_rows_move_with_the_buffer() -> None:
    form = plan_form({Q0: 3, K0: 5}, tiny_layout(), 2)
    rows = form.place([(1280, form.num_elements)]).rows
    assert rows[0] == (1280, 8, 3, 1280 + 256, 5, 1280 + 384, 0, 0)
    assert rows[1] == EMPTY_ROW


def test_a_buffer_is_cut_between_blocks_only() -> None:
    ranks = {Q0: 3, K0: 5, "model.layers.0.mlp.down_proj": 2}
    form = plan_form(ranks, tiny_layout(), 4, {"extra": (100,)})
    (a, _, _, b_q, _, b_k, _, _), down = form.rows[0], form.rows[3]
    assert form.piece_bytes == 4 * max(b_q - a, b_k - b_q, down[0] - b_k, down[3] - down[0])
    rest = form.num_elements - b_k
    placement = form.place([(4096, b_k + 64), (1024, rest)])
    assert placement.runs == ((0, b_k, 4096), (b_k, form.num_elements, 1024))
    assert placement.rows[0] == (4096, 8, 3, 4096 + b_q, 5, 1024, 0, 0)
    assert placement.rows[1] == EMPTY_ROW
    assert placement.rows[3][0] == 1024 + down[0] - b_k
    assert placement.parts[0].offset == 1024 + form.parts[0].offset - b_k
    with pytest.raises(ValueError, match="too short"):
        form.place([(4096, b_k + 64), (1024, rest - 64)])


def with_part(
    directory: Path, build: Callable[[Sequence[torch.Tensor]], torch.Tensor]
) -> PackedAdapter:
    """An adapter packed with a part [2, 3] made of its first module's A and B."""
    layout = tiny_layout()
    spec = read_spec(write_adapter(directory), layout)
    module = spec.modules[Q0]
    spec = replace(spec, parts=(PartSpec("extra", (2, 3), (module.a, module.b), build),))
    packed = allocate(spec.form(layout, 4), torch.float32, pin=False)
    pack(spec, layout, packed, lambda done: None)
    return packed


def test_a_part_is_built_of_whole_tensors_and_lies_behind_the_sites(tmp_path: Path) -> None:
    packed = with_part(tmp_path, lambda weights: weights[0][:2, :3] + weights[1][:2, :3].double())
    a, b = (tensors_of()[f"base_model.model.{Q0}.lora_{side}.weight"] for side in "AB")
    (part,) = packed.form.parts
    assert part.offset * 4 % ALIGNMENT == 0
    assert part.offset + 64 == packed.form.num_elements
    found = packed.buffer[part.offset : part.offset + 6].view(2, 3)
    torch.testing.assert_close(found, a[:2, :3] + b[:2, :3])
    placement = packed.form.place([(64, packed.form.num_elements)])
    assert placement.parts[0].offset == part.offset + 64


def test_a_part_that_comes_out_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterUnservable, match="extra holds values that are not finite"):
        with_part(tmp_path, lambda weights: weights[0][:2, :3] / 0)


@pytest.mark.parametrize(
    "file_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_holds_a_and_the_scaled_transposed_b(
    tmp_path: Path, file_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    tensors = {name: tensor.to(file_dtype) for name, tensor in tensors_of().items()}
    packed = pack_directory(write_adapter(tmp_path, config_of(lora_alpha=3), tensors), dtype)
    a_offset, total, rank, b_offset, *_ = packed.form.rows[0]
    assert (total, rank) == (4, 4)
    a, b = (tensors[f"base_model.model.{Q0}.lora_{side}.weight"] for side in "AB")
    assert torch.equal(packed.buffer[a_offset : a_offset + 128].view(4, 32), a.to(dtype))
    scaled = (b.float() * 0.75).to(dtype)
    assert torch.equal(packed.buffer[b_offset : b_offset + 128].view(4, 32), scaled.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torch_scales_half_types_as_if_in_float32(dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    for scale in (1.0, 2.0, 0.75, 1 / 3, 16 / 7**0.5, 1e-3, 3e38):
        assert torch.equal(every * scale, (every.float() * scale).to(dtype)), scale


@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16])
def test_b_is_the_same_in_blocks_and_from_several_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_dtype: torch.dtype
) -> None:
    tensors = {name: tensor.to(file_dtype) for name, tensor in tensors_of().items()}
    spec = read_spec(write_adapter(tmp_path, config_of(lora_alpha=3), tensors), tiny_layout())
    site = tiny_layout().sites[0]
    ranges = ((24, 31), (3, 14))
    target = replace(site.targets[0], out_ranges=ranges)
    spec = replace(spec, modules={Q0: replace(spec.modules[Q0], target=target)})
    layout = replace(tiny_layout(), sites=(replace(site, targets=(target,)),))
    monkeypatch.setattr("lorafleet.cache.packing._BLOCK_ELEMENTS", 5 * 4)
    packed = allocate(spec.form(layout, 2), torch.bfloat16, pin=False)
    pack(spec, layout, packed, lambda done: None)
    b = tensors[f"base_model.model.{Q0}.lora_B.weight"]
    rows = torch.cat([b[start:stop] for start, stop in ranges])
    wanted = (rows.float() * 0.75).to(torch.bfloat16).T
    b_offset = packed.form.rows[0][3]
    assert torch.equal(packed.buffer[b_offset : b_offset + wanted.numel()].view(4, 18), wanted)


def test_large_buffers_are_empty_and_of_their_exact_size() -> None:
    form = replace(plan_form({Q0: 3}, tiny_layout(), 2), num_elements=(5 << 20) // 2)
    packed = [allocate(form, torch.bfloat16, pin=False) for _ in range(2)]
    for number, each in enumerate(packed):
        assert each.buffer.nbytes == 5 << 20
        assert not each.buffer.any()
        each.buffer.fill_(number + 1)
    assert bool((packed[0].buffer == 1).all())


def test_a_rank_holds_its_slice(tmp_path: Path) -> None:
    tensors = tensors_of(("self_attn.q_proj", "self_attn.o_proj"))
    directory = write_adapter(tmp_path, config_of(lora_alpha=4), tensors)
    for rank in (0, 1):
        packed = pack_directory(directory, rank=rank, world=2)
        half = slice(16 * rank, 16 * rank + 16)
        _, _, _, q_b, *_ = packed.form.rows[0]
        b = tensors[f"base_model.model.{Q0}.lora_B.weight"]
        assert torch.equal(packed.buffer[q_b : q_b + 64].view(4, 16), b[half].T)
        o_a, *_ = packed.form.rows[1]
        a = tensors["base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"]
        assert torch.equal(packed.buffer[o_a : o_a + 64].view(4, 16), a[:, half])


@pytest.mark.parametrize("side", "AB")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_on_every_rank(
    tmp_path: Path, side: str, value: float
) -> None:
    name = f"model.layers.1.self_attn.q_proj.lora_{side}"
    tensors = tensors_of()
    tensors[f"base_model.model.{name}.weight"][-1, -1] = value
    write_adapter(tmp_path, tensors=tensors)
    for rank in (0, 1):
        with pytest.raises(AdapterUnservable, match=r"lora_. of model\.layers\.1.*not finite"):
            pack_directory(tmp_path, rank=rank, world=2)


def test_values_too_large_for_the_serving_dtype_are_refused(tmp_path: Path) -> None:
    tensors = {name: tensor * 1e6 for name, tensor in tensors_of().items()}
    write_adapter(tmp_path, tensors=tensors)
    pack_directory(tmp_path, torch.float32)
    with pytest.raises(AdapterUnservable, match=r"too large for torch\.float16"):
        pack_directory(tmp_path, torch.float16)


def test_a_scale_that_overflows_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, config_of(lora_alpha=1e300))
    with pytest.raises(AdapterUnservable, match="lora_B"):
        pack_directory(tmp_path)


@pytest.mark.parametrize("change", ["shrink", "grow", "remove", "replace"])
def test_files_that_change_after_their_header_was_read(tmp_path: Path, change: str) -> None:
    layout = tiny_layout()
    spec = read_spec(write_adapter(tmp_path), layout)
    path = tmp_path / "adapter_model.safetensors"
    if change == "shrink":
        path.write_bytes(path.read_bytes()[:500])
    elif change == "grow":
        path.write_bytes(path.read_bytes() + b"more")
    else:
        path.unlink()
        if change == "replace":
            write_adapter(tmp_path, tensors=tensors_of(seed=1))
    packed = allocate(spec.form(layout, 4), torch.float32, pin=False)
    with pytest.raises((SourceUnavailable, AdapterUnservable)):
        pack(spec, layout, packed, lambda done: None)
