"""What adapters do to linear layers, against peft on the same weights: logits and greedy tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lorafleet.kernels.lora.op import Pending
from lorafleet.shard.layers import RowSite
from tests.checkpoints import make_checkpoint
from tests.shard.ranks import logits_of

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True")

PROMPT = torch.randint(3, 259, (21,), generator=torch.Generator().manual_seed(1)).tolist()
NEW_TOKENS = 8
CHUNKS = [21] + [1] * (NEW_TOKENS - 1)

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OWN_FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "dora": {"use_dora": True, "target_modules": ALL},
    "dora, some of a fused group": {"use_dora": True, "target_modules": ["k_proj", "gate_proj"]},
    "dora with rslora and patterns": {
        "use_dora": True,
        "use_rslora": True,
        "target_modules": "all-linear",
        "rank_pattern": {"o_proj": 7},
        "alpha_pattern": {"down_proj": 5},
    },
    "dora with biases": {"use_dora": True, "bias": "all", "target_modules": ALL},
    "bias lora_only": {"bias": "lora_only", "target_modules": ["q_proj", "o_proj", "down_proj"]},
    "bias all": {"bias": "all", "target_modules": ["v_proj", "up_proj"]},
    "lora_bias": {"lora_bias": True, "target_modules": ALL},
    "lora_bias and bias all": {"lora_bias": True, "bias": "all", "target_modules": ["o_proj"]},
    "fan_in_fan_out": {"fan_in_fan_out": True, "use_dora": True, "target_modules": ["q_proj"]},
    "rank 512": {"r": 512, "lora_alpha": 64, "target_modules": ["q_proj", "up_proj"]},
    "regex": {"target_modules": r".*\.1\.(self_attn\.[qk]|mlp\.up)_proj"},
    "layers and exclusions": {
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
        "exclude_modules": ["mlp.up_proj"],
    },
    "dropout": {"lora_dropout": 0.5, "target_modules": ["o_proj"]},
    "mica": {"init_lora_weights": "mica", "target_modules": ["o_proj"]},
}  # fmt: skip


def save_adapter(model: Path, directory: Path, options: dict[str, Any]) -> Path:
    """An adapter with weights as training could leave them, saved by peft."""
    torch.manual_seed(len(options))
    base = AutoModelForCausalLM.from_pretrained(model)
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 6} | options)
    trained = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
            elif name.endswith("bias") and parameter.requires_grad:
                parameter.normal_(std=0.5)
            elif "lora_" in name:
                parameter.normal_(std=0.2)
    trained.save_pretrained(directory)
    return directory


def peft_answer(model: Path, adapter: Path | None) -> tuple[list[int], torch.Tensor]:
    """Prompt with greedy continuation, and the logits of all of it but the last token."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    served = base if adapter is None else PeftModel.from_pretrained(base, adapter)
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            logits = served.eval()(ids).logits[0]
            ids = torch.cat([ids, logits[-1].argmax().view(1, 1)], 1)
    return ids[0].tolist(), logits


def check(model: Path, adapters: list[Path | None], fused: bool = True) -> None:
    """All adapters in one batch, each with the tokens that peft answers with it."""
    answers = [peft_answer(model, adapter) for adapter in adapters]
    tokens = [ids[:-1] for ids, _ in answers]
    for world in (1, 2):
        logits = logits_of(model, adapters, tokens, CHUNKS, world, fused)
        for adapter, (ids, wanted), found in zip(adapters, answers, logits, strict=True):
            error = (found - wanted).norm() / wanted.norm()
            assert error < 1e-4, (adapter, world, float(error))
            assert found.argmax(1)[len(PROMPT) - 1 :].tolist() == ids[len(PROMPT) :]
    bare = peft_answer(model, None)[1][: len(PROMPT)]
    for adapter, (_, wanted) in zip(adapters, answers, strict=True):
        if adapter is not None:  # so that an adapter left out would be noticed
            assert (wanted[: len(PROMPT)] - bare).norm() / bare.norm() > 1e-2


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """q, k and v have biases, the other linears have none."""
    return make_checkpoint("qwen2", tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every linear has a bias."""
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("feature", FEATURES)
def test_feature(feature: str, llama: Path, tmp_path: Path) -> None:
    check(llama, [save_adapter(llama, tmp_path, FEATURES[feature])])


def test_in_one_batch(qwen: Path, tmp_path: Path) -> None:
    names = ["plain", "dora", "lora_bias", "dora with biases", "bias lora_only"]
    saved = [save_adapter(qwen, tmp_path / name, FEATURES[name]) for name in names]
    check(qwen, [None, *saved[:2], None, *saved[2:]])


def test_where_layers_are_transformers_own(tmp_path: Path) -> None:
    model = make_checkpoint("gemma2", tmp_path / "model")
    names = ["dora", "lora_bias"]
    saved = [save_adapter(model, tmp_path / name, FEATURES[name]) for name in names]
    check(model, [None, *saved], fused=False)


@pytest.mark.parametrize("targets", [OWN_FUSED, ["qkv_proj"], ["gate_up_proj"]])
def test_a_model_whose_own_linears_are_fused(targets: list[str], tmp_path: Path) -> None:
    model = make_checkpoint("phi3", tmp_path / "model")
    options = {"use_dora": True, "target_modules": targets}
    check(model, [save_adapter(model, tmp_path / "adapter", options)])


def test_the_last_layer_knows_whose_its_tokens_are(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["plain", "dora", "lora_bias", "dora with biases", "bias lora_only"]
    saved = [save_adapter(qwen, tmp_path / name, FEATURES[name]) for name in names]
    adapters = [None, *saved[:2], None, *saved[2:]]
    tokens = [PROMPT] * len(adapters)
    samples = [True, False, True, True, False, True, True]
    read: list[int] = []
    product = RowSite.product

    def counted(site: RowSite, rows: torch.Tensor) -> tuple[torch.Tensor, Pending | None]:
        read.append(len(rows))
        return product(site, rows)

    monkeypatch.setattr(RowSite, "product", counted)
    for world in (1, 2):
        every = logits_of(qwen, adapters, tokens, [len(PROMPT)], world)
        read.clear()
        last = logits_of(qwen, adapters, tokens, [len(PROMPT)], world, samples=samples)
        expected = [rows[-1:] for rows, drawn in zip(every, samples, strict=True) if drawn]
        torch.testing.assert_close(torch.cat(last), torch.cat(expected), rtol=1e-4, atol=1e-4)
        # o and down of both layers on each rank: the last layer's of what is sampled alone.
        assert (
            sorted(read) == [sum(samples)] * 2 * world + [len(adapters) * len(PROMPT)] * 2 * world
        )
