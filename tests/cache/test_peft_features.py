"""Every feature peft has for LoRA is decided: served as peft does, without effect, or refused.

What is served is compared with peft's results in tests/shard/test_peft_linears.py.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftType

from lorafleet.cache.adapter_files import read_spec
from lorafleet.cache.errors import AdapterUnservable
from tests.cache.adapter_cases import config_of, tensors_of, tiny_layout, write_adapter

SERVED = {
    "peft_type": "LORA",
    "base_model_name_or_path": "some/base",
    "r": 4,
    "lora_alpha": 16,
    "target_modules": ["q_proj"],
    "exclude_modules": ["k_proj"],
    "layers_to_transform": [0, 1],
    "layers_pattern": "layers",
    "rank_pattern": {"k_proj": 2},
    "alpha_pattern": {"q_proj": 3},
    "use_rslora": True,
    "bias": "lora_only",
    "init_lora_weights": "gaussian",
}
WITH_TENSORS = {"use_dora": True, "lora_bias": True}  # served with the tensors that go with them
NO_EFFECT = {
    "task_type": "CAUSAL_LM",
    "peft_version": "0.21.2",
    "auto_mapping": {"parent_library": "transformers"},
    "revision": "main",
    "inference_mode": False,
    "lora_dropout": 0.5,
    "fan_in_fan_out": True,
    "megatron_core": "megatron.core",
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": {"corda_method": "ipm"},
    "lora_ga_config": {"scale": "stable"},
    "velora_config": {"num_groups": 2},
    "qalora_group_size": 16,
    "runtime_config": {"ephemeral_gpu_offload": True},
    "ensure_weight_tying": True,
}
REFUSED = {
    "megatron_config": {"tensor_model_parallel_size": 2},
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "layer_replication": [[0, 2], [1, 2]],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1.0},
    "monteclora_config": {"num_samples": 2},
}
ELSEWHERE = {"modules_to_save", "trainable_token_indices", "target_parameters"}


def read(directory: Path, **options: Any) -> int:
    return read_spec(write_adapter(directory, config_of() | options), tiny_layout()).rank


def test_every_field_of_pefts_config_is_decided() -> None:
    decided = SERVED.keys() | WITH_TENSORS.keys() | NO_EFFECT.keys() | REFUSED.keys() | ELSEWHERE
    assert {field.name for field in fields(LoraConfig)} <= decided


@pytest.mark.parametrize("field", [*SERVED, *NO_EFFECT])
def test_a_served_field(field: str, tmp_path: Path) -> None:
    assert read(tmp_path, **{field: (SERVED | NO_EFFECT)[field]}) == 4


@pytest.mark.parametrize("field", WITH_TENSORS)
def test_a_field_whose_tensors_are_missing_is_named(field: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterUnservable, match=f"{field} is true and .* has no"):
        read(tmp_path, **{field: True})


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_is_not_served_is_named(field: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterUnservable, match=f"{field} is set"):
        read(tmp_path, **{field: REFUSED[field]})
    assert read(tmp_path, **{field: None}) == 4


@pytest.mark.parametrize("kind", [kind.value for kind in PeftType if kind != PeftType.LORA])
def test_other_kinds_of_peft_are_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterUnservable, match=f"peft_type is '{kind}'"):
        read(tmp_path, peft_type=kind)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_8", "olora", "OLoRA", "corda", "loftq"])
def test_inits_that_change_the_base_are_refused(init: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterUnservable, match=r"init_lora_weights is .*convert the adapter"):
        read(tmp_path, init_lora_weights=init)


@pytest.mark.parametrize(
    "module",
    [
        "model.vision_tower.encoder.layers.0.self_attn.q_proj",
        "model.language_model.layers.0.self_attn.q_proj",  # text in a multimodal wrapper
        "model.layers.0.mlp.gate",  # a router of experts
        "model.layers.2.self_attn.q_proj",
        "transformer.h.0.attn.c_attn",
    ],
)
def test_modules_the_model_does_not_have_are_named(module: str, tmp_path: Path) -> None:
    tensors = {f"base_model.model.{module}.lora_{side}.weight": torch.zeros(4, 32) for side in "AB"}
    write_adapter(tmp_path, tensors=tensors_of() | tensors)
    with pytest.raises(AdapterUnservable, match=module.replace(".", r"\.")):
        read_spec(tmp_path, tiny_layout())
