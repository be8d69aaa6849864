"""DoRA and biases as an adapter's files have them: which are served, and why others are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafleet.cache.adapter_files import AdapterSpec, read_spec
from lorafleet.cache.errors import AdapterUnservable
from lorafleet.cache.host_memory import allocate
from lorafleet.cache.layout import Interval, ModelLayout
from lorafleet.cache.packing import pack
from tests.cache.adapter_cases import config_of, tensors_of, tiny_layout, write_adapter

MODULE = "model.layers.0.self_attn.q_proj"
Q0 = f"base_model.model.{MODULE}"
DORA = {f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_magnitude_vector": torch.ones(32)
        for i in range(2)}  # fmt: skip


class Base:
    """Base weights that are all the same."""

    def rows(self, name: str, intervals: Sequence[Interval]) -> torch.Tensor:
        count = sum(stop - start for start, stop in intervals)
        return torch.ones(count, 32) if name.endswith(".weight") else torch.ones(count)


BASE = Base()


def biased_layout() -> ModelLayout:
    """The tiny model with a bias in every linear."""
    layout = tiny_layout()
    sites = [
        replace(site, targets=tuple(replace(target, has_bias=True) for target in site.targets))
        for site in layout.sites
    ]
    return replace(layout, sites=tuple(sites))


def read(
    directory: Path, extra: dict[str, torch.Tensor], layout: ModelLayout | None = None,
    base: Base | None = BASE, **fields: Any,
) -> AdapterSpec:  # fmt: skip
    write_adapter(directory, config_of(**fields), tensors_of() | extra)
    return read_spec(directory, layout or biased_layout(), base)


@pytest.mark.parametrize(
    "suffix",
    [
        "lora_magnitude_vector",
        "lora_magnitude_vector.weight",
        "lora_magnitude_vector.default",
        "lora_magnitude_vector.default.weight",
    ],
)
def test_every_name_peft_reads_a_magnitude_under(suffix: str, tmp_path: Path) -> None:
    extra = {name.replace("lora_magnitude_vector", suffix): t for name, t in DORA.items()}
    spec = read(tmp_path, extra, use_dora=True)
    assert [part.name for part in spec.parts] == [
        f"model.layers.{i}.self_attn.q_proj.scale_shift" for i in range(2)
    ]


def test_tensors_with_the_name_of_pefts_default_adapter(tmp_path: Path) -> None:
    tensors = {
        name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors_of().items()
    }
    write_adapter(tmp_path, tensors=tensors)
    assert len(read_spec(tmp_path, tiny_layout()).modules) == 2


def test_a_bias_alone_makes_a_part_and_no_lora(tmp_path: Path) -> None:
    other = "model.layers.0.mlp.up_proj"
    spec = read(tmp_path, {f"base_model.model.{other}.bias": torch.full((48,), 3.0)}, bias="all")
    assert other not in spec.modules
    (part,) = spec.parts
    assert part.name == f"{other}.scale_shift"
    found = part.build([torch.full((48,), 3.0)])
    assert torch.equal(found, torch.stack([torch.ones(48), torch.full((48,), 2.0)]))  # instead of 1


@pytest.mark.parametrize(
    ("fields", "extra", "said"),
    [
        ({"use_dora": True}, {}, f"use_dora is true and {MODULE} has no lora_magnitude_vector"),
        ({}, DORA, f"use_dora is false and {MODULE} has a lora_magnitude_vector"),
        ({"lora_bias": True}, {}, f"lora_bias is true and {MODULE} has no lora_B.bias"),
        ({}, {f"{Q0}.lora_B.bias": torch.ones(32)}, f"lora_bias is false and {MODULE} has a"),
        ({"use_dora": True, "lora_bias": True}, DORA, "lora_bias is set beside use_dora"),
        (
            {"use_dora": True},
            DORA | {f"{Q0}.lora_magnitude_vector": torch.ones(31)},
            rf"lora_magnitude_vector of {MODULE} has shape \[31\].*must be \[32\]",
        ),
        ({}, {f"{Q0}.base_layer.bias": torch.ones(1, 32)}, rf"bias of {MODULE} has shape \[1, 32"),
        ({}, {f"{Q0}.bias": torch.ones(32).int()}, f"bias of {MODULE} is I32"),
        (
            {"bias": "all"},
            {f"{Q0}.bias": torch.ones(32), f"{Q0}.base_layer.bias": torch.ones(32)},
            "has bias twice",
        ),
        (
            {"use_dora": True},
            DORA | {"base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector":
                    torch.ones(48)},
            "up_proj has lora_magnitude_vector and no lora_A",
        ),
    ],
)  # fmt: skip
def test_what_does_not_agree_is_refused(
    fields: dict[str, Any], extra: dict[str, torch.Tensor], said: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterUnservable, match=said):
        read(tmp_path, extra, **fields)


def test_a_bias_the_base_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterUnservable, match=f"bias for {MODULE}, which has none in tiny-llama"):
        read(tmp_path, {f"{Q0}.base_layer.bias": torch.ones(32)}, tiny_layout(), bias="lora_only")


def test_without_base_weights_what_needs_them_is_refused(tmp_path: Path) -> None:
    for extra, fields in (
        (DORA, {"use_dora": True}),
        ({f"{Q0}.base_layer.bias": torch.ones(32)}, {"bias": "lora_only"}),
    ):
        with pytest.raises(AdapterUnservable, match="--load-format dummy"):
            read(tmp_path, extra, base=None, **fields)
    bias = {name.replace("magnitude_vector", "B.bias"): tensor for name, tensor in DORA.items()}
    assert read(tmp_path, bias, base=None, lora_bias=True).parts


@pytest.mark.parametrize(
    ("magnitude", "said"),
    [(float("nan"), "lora_magnitude_vector holds values that"), (1e5, "too large for torch.float")],
)
def test_magnitudes_that_are_no_numbers(magnitude: float, said: str, tmp_path: Path) -> None:
    extra = DORA | {f"{Q0}.lora_magnitude_vector": torch.full((32,), magnitude * 1e5)}
    layout = biased_layout()
    spec = read(tmp_path, extra, layout, use_dora=True)
    packed = allocate(spec.form(layout, 2), torch.float16, pin=False)
    with pytest.raises(AdapterUnservable, match=said):
        pack(spec, layout, packed, lambda done: None)


def test_progress_counts_a_tensor_once(tmp_path: Path) -> None:
    layout = biased_layout()
    spec = read(tmp_path, DORA, layout, use_dora=True)
    packed = allocate(spec.form(layout, 4), torch.float32, pin=False)
    done: list[int] = []
    pack(spec, layout, packed, done.append)
    assert done == sorted(done)
    assert done[-1] == sum(tensor.nbytes for tensor in (tensors_of() | DORA).values())
