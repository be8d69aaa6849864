"""Tensor parallel over two GPUs: captured steps with NCCL in them, as likely as peft's tokens."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.checkpoints import RECIPES, make_adapters, make_checkpoint
from tests.e2e.service import Service, serve
from tests.shard.cuda_worker import regret

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

NAMES: list[str | None] = [None, *(recipe.name for recipe in RECIPES)]
NEW_TOKENS = 12


async def ask(service: Service, name: str | None, number: int) -> tuple[list[int], list[int]]:
    """Prompt and answer in tokens."""
    parameters: dict[str, Any] = {
        "max_new_tokens": NEW_TOKENS, "details": True, "decoder_input_details": True,
        "ignore_eos_token": True,
    }  # fmt: skip
    if name is not None:
        parameters["adapter_id"] = name
    body = {"inputs": f"{number} words for {number} adapters", "parameters": parameters}
    async with service.session() as session, session.post("/generate", json=body) as response:
        assert response.status == 200, await response.text()
        details = (await response.json())["details"]
    return [t["id"] for t in details["prefill"]], [t["id"] for t in details["tokens"]]


def test_two_gpus_answer_as_peft_would(tmp_path: Path) -> None:
    base = make_checkpoint(
        "llama", tmp_path / "model", hidden_size=256, head_dim=64, initializer_range=0.05
    )
    make_adapters(base, tmp_path / "adapters")
    flags = ("--num-shard=2", "--dtype=bfloat16", f"--adapter-root={tmp_path / 'adapters'}")

    async def ask_all(service: Service) -> list[tuple[list[int], list[int]]]:
        rounds = [ask(service, name, i) for name in NAMES for i in range(3)]
        return list(await asyncio.gather(*rounds))

    with serve(base, tmp_path, *flags) as service:
        answers = asyncio.run(ask_all(service))
        assert "captured" in service.log.read_text()
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.to("cuda")
    for index, name in enumerate(NAMES):
        adapted = (
            model
            if name is None
            else PeftModel.from_pretrained(model, tmp_path / "adapters" / name)
        )
        for prompt, drawn in answers[3 * index : 3 * index + 3]:
            assert regret(adapted, prompt, drawn) < 0.03, (name, drawn)
        model = model if name is None else adapted.unload()
