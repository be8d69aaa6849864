"""What is read of an adapter, and every reason to refuse one."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorafleet.cache.adapter_files import AdapterSpec, digest_files, read_spec
from lorafleet.cache.errors import AdapterUnservable
from tests.cache.adapter_cases import config_of, tensors_of, tiny_layout, write_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def read(directory: Path) -> AdapterSpec:
    return read_spec(directory, tiny_layout())


def refusal(directory: Path) -> str:
    with pytest.raises(AdapterUnservable) as caught:
        read(directory)
    return str(caught.value)


def test_reads_ranks_scales_and_targets(tmp_path: Path) -> None:
    tensors = tensors_of(("self_attn.q_proj", "mlp.down_proj"))
    for side, shape in (("A", (8, 32)), ("B", (32, 8))):
        tensors[f"{Q0}.lora_{side}.weight"] = torch.zeros(shape)
    config = config_of(
        rank_pattern={"layers.0.self_attn.q_proj": 8}, alpha_pattern={".*down_proj": 3}
    )
    spec = read(write_adapter(tmp_path, config, tensors))
    assert spec.rank == 8
    assert spec.target_modules == ["down_proj", "q_proj"]
    scales = {name: module.scale for name, module in spec.modules.items()}
    assert scales == {
        "model.layers.0.self_attn.q_proj": 8 / 8,
        "model.layers.1.self_attn.q_proj": 8 / 4,
        "model.layers.0.mlp.down_proj": 3 / 4,
        "model.layers.1.mlp.down_proj": 3 / 4,
    }


def test_rslora_divides_by_the_root_of_the_rank(tmp_path: Path) -> None:
    spec = read(write_adapter(tmp_path, config_of(use_rslora=True)))
    assert {module.scale for module in spec.modules.values()} == {8 / 2}


def test_digest_is_of_config_and_weights(tmp_path: Path) -> None:
    spec = read(write_adapter(tmp_path))
    done: list[int] = []
    content = (tmp_path / CONFIG).read_bytes() + (tmp_path / WEIGHTS).read_bytes()
    assert digest_files(spec, done.append) == hashlib.sha256(content).hexdigest()
    assert done[-1] == len(content) == spec.nbytes


def test_notices_that_the_files_changed(tmp_path: Path) -> None:
    spec = read(write_adapter(tmp_path))
    assert spec.is_current()
    os.utime(tmp_path / WEIGHTS, ns=(1, 1))
    assert not spec.is_current()


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "eva", "mica"])
def test_starting_points_that_keep_the_base_are_served(tmp_path: Path, init: Any) -> None:
    assert read(write_adapter(tmp_path, config_of(init_lora_weights=init))).rank == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("peft_type", None),
        ("use_dora", True),
        ("bias", "lora"),
        ("bias", ["none"]),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),  # without weights
        ("modules_to_save", ["embed_tokens", "norm"]),
        ("modules_to_save", "lm_head"),
        ("modules_to_save", [""]),
        ("ensure_weight_tying", 1),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [1, 2]),
        ("trainable_token_indices", {"embed_tokens": [1]}),  # without weights
        ("trainable_token_indices", {"q_proj": [1]}),
        ("trainable_token_indices", [-1]),
        ("trainable_token_indices", [1, 1]),
        ("trainable_token_indices", ["a"]),
        ("trainable_token_indices", 5),
        ("target_parameters", ["experts.down_proj"]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", {}),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1}),
        ("monteclora_config", {"samples": 1}),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("use_newlora", True),
        ("newlora_config", {"a": 1}),
        ("use_rslora", "yes"),
        ("r", 0),
        ("r", 513),
        ("r", True),
        ("r", "8"),
        ("r", 4.0),
        ("lora_alpha", "16"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 10**400),
        ("rank_pattern", [1]),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_(proj": 4}),
        ("rank_pattern", {"(a|b)*": 4}),
        ("alpha_pattern", {"q_proj": None}),
        ("alpha_pattern", {"x" * 257: 4}),
        ("alpha_pattern", {".*.*.*.*": 4}),
        ("alpha_pattern", {f".*{n}": 4 for n in range(33)}),
        ("alpha_pattern", {f".*.*.*{n}": 4 for n in range(32)}),
    ],
)
def test_refusal_names_the_field(tmp_path: Path, field: str, value: Any) -> None:
    assert field in refusal(write_adapter(tmp_path, config_of(**{field: value})))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_dropout", 0.1),
        ("fan_in_fan_out", True),
        ("inference_mode", True),
        ("task_type", "CAUSAL_LM"),
        ("auto_mapping", {"base_model_class": "LlamaForCausalLM"}),
        ("revision", "main"),
        ("peft_version", "0.99.0"),
        ("megatron_core", "megatron.core"),
        ("qalora_group_size", 16),
        ("runtime_config", {"ephemeral_gpu_offload": True}),
        ("loftq_config", {"loftq_bits": 4}),
        ("eva_config", {"rho": 2.0}),
        ("corda_config", {"covariance_file": None}),
        ("lora_ga_config", {"direction": "ArB2r"}),
        ("velora_config", {"num_groups": 2}),
        ("use_newlora", False),
        ("newlora_config", None),
        ("a_newer_field", 3),
        ("init_lora_weights", "Gaussian"),
    ],
)
def test_fields_that_change_nothing_are_served(tmp_path: Path, field: str, value: Any) -> None:
    assert read(write_adapter(tmp_path, config_of(**{field: value}))).rank == 4


def test_r_and_alpha_have_pefts_defaults(tmp_path: Path) -> None:
    config = config_of()
    del config["r"], config["lora_alpha"]
    spec = read(write_adapter(tmp_path, config, tensors_of(rank=8)))
    assert (spec.rank, {m.scale for m in spec.modules.values()}) == (8, {1.0})


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b" " * (1 << 21)]
)
def test_a_config_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    write_adapter(tmp_path)
    (tmp_path / CONFIG).write_bytes(content)
    assert CONFIG in refusal(tmp_path)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path)
    (tmp_path / name).unlink()
    assert f"no {name}" in refusal(tmp_path)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert "not a regular file" in refusal(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    assert "--allow-pickled-adapters" in refusal(tmp_path)


def test_a_wrong_base_names_module_and_both_models(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32),
        "base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight": torch.zeros(32, 4),
    }
    sentence = refusal(write_adapter(tmp_path, tensors=tensors))
    assert "model.layers.7.self_attn.q_proj" in sentence
    assert "tiny/base" in sentence
    assert "tiny-llama" in sentence


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("lora_A", (4, 33)),
        ("lora_A", (5, 32)),
        ("lora_A", (4, 32, 1)),
        ("lora_B", (31, 4)),
        ("lora_B", (32, 5)),
        ("lora_B", (128,)),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    tensors = tensors_of() | {f"{Q0}.{name}.weight": torch.zeros(shape)}
    sentence = refusal(write_adapter(tmp_path, tensors=tensors))
    assert f"{name} of model.layers.0.self_attn.q_proj" in sentence
    assert str(list(shape)) in sentence


@pytest.mark.parametrize(
    "name",
    [
        f"{Q0}.lora_A.mine.weight",
        f"{Q0}.base_layer.weight",
        f"{Q0}.lora_embedding_A",
        "base_model.model.lm_head.bias",
        "base_model.model.lm_head.weight",  # of another shape
        "base_model.model.lm_head.lora_magnitude_vector",
        "base_model.model.model.embed_tokens.lora_embedding_A",  # without B
        "base_model.model.model.norm.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "",
    ],
)
def test_an_unknown_tensor_is_named(tmp_path: Path, name: str) -> None:
    assert repr(name) in refusal(
        write_adapter(tmp_path, tensors=tensors_of() | {name: torch.zeros(4)})
    )


@pytest.mark.parametrize(("gone", "left"), ["AB", "BA"])
def test_half_an_adapter_is_refused(tmp_path: Path, gone: str, left: str) -> None:
    tensors = tensors_of()
    del tensors[f"{Q0}.lora_{gone}.weight"]
    sentence = refusal(write_adapter(tmp_path, tensors=tensors))
    assert f"has lora_{left} and no lora_{gone}" in sentence


def test_integers_are_no_weights(tmp_path: Path) -> None:
    tensors = tensors_of() | {f"{Q0}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int8)}
    assert "I8" in refusal(write_adapter(tmp_path, tensors=tensors))


def _header(entries: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 1 << 60),
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 2) + b"{}" + b"extra",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{x",
        _header({}),
        _header({"a": 1}),
        _header({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4),
        _header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}, b"\0" * 8),
        _header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\0" * 8),
        _header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}),
        _header({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, b"\0" * 4),
        _header({"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        _header({"a": {"dtype": "F32", "shape": [1 << 70], "data_offsets": [0, 1 << 72]}}),
        _header({"a": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}}, b"\0" * 4),
    ],
)
def test_a_corrupt_weights_file_is_refused(tmp_path: Path, content: bytes) -> None:
    write_adapter(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(content)
    assert WEIGHTS in refusal(tmp_path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    for length in (*range(0, 200, 7), *range(200, len(content), 501), len(content) - 1):
        (tmp_path / WEIGHTS).write_bytes(content[:length])
        assert "corrupt" in refusal(tmp_path)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    fields=st.dictionaries(
        st.sampled_from([*config_of(), "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"]),
        _json,
        max_size=3,
    ),
    entry=_json,
)
def test_nonsense_is_served_or_refused_never_a_crash(
    tmp_path: Path, fields: dict[str, Any], entry: Any
) -> None:
    write_adapter(tmp_path, config_of(**fields))
    tensor = {f"{Q0}.lora_A.weight": entry}
    for content in ((tmp_path / WEIGHTS).read_bytes(), _header(tensor), _header({"a": entry})):
        (tmp_path / WEIGHTS).write_bytes(content)
        with suppress(AdapterUnservable):
            assert read(tmp_path).modules
