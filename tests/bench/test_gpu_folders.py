"""The folders that `make gpu` serves: what reads them finds what was meant."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from lorafleet.cache.adapter_files import read_spec
from lorafleet.router.tokenizer import Tokenizer
from lorafleet.shard.group import Group
from lorafleet.shard.model import Decoder
from tests.bench.gpu.adapter_folders import drop_from_page_cache, write_adapters
from tests.bench.gpu.checkpoint import token_ids, write_checkpoint
from tests.bench.gpu.shapes import ALL_LINEAR, SHAPES

TINY = SHAPES["llama-tiny"]
CPU = torch.device("cpu")


def test_adapters_are_served(tmp_path: Path) -> None:
    write_adapters(TINY, tmp_path, ["a0", "a1"], 4)
    drop_from_page_cache(tmp_path)
    layout = Decoder(TINY.config(), Group(0, 1, CPU, ""), torch.bfloat16, CPU).layout
    spec = read_spec(tmp_path / "a0", layout)
    assert (spec.rank, set(spec.target_modules)) == (4, set(ALL_LINEAR))
    assert {module.scale for module in spec.modules.values()} == {2.0}
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a0", "a1")]
    assert files[0] != files[1]
    assert TINY.adapter_bytes(4) < len(files[0]) < 1.5 * TINY.adapter_bytes(4)


def test_adapters_are_pefts(tmp_path: Path) -> None:
    write_adapters(TINY, tmp_path, ["a0"], 4, ("q_proj", "v_proj"))
    model = AutoModelForCausalLM.from_config(TINY.config(), dtype=torch.bfloat16)
    adapted = PeftModel.from_pretrained(model, tmp_path / "a0")
    weights = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
    assert len(weights) == 2 * 2 * TINY.layers
    assert all(bool(weight.any()) for weight in weights.values())


def test_a_text_names_its_tokens(tmp_path: Path) -> None:
    write_checkpoint(TINY, tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).vocab_size == TINY.vocab_size
    tokenizer = Tokenizer((tmp_path / "tokenizer.json").read_bytes(), 1)
    ids = Random(0).choices(range(TINY.vocab_size), k=400)
    assert token_ids(tokenizer.decode(ids)) == ids
    detokenizer = tokenizer.detokenizer([])
    assert token_ids("".join(map(detokenizer.step, ids))) == ids
    assert asyncio.run(tokenizer.encode("any text")) == token_ids("any text")
    tokenizer.close()
