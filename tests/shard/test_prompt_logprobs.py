"""Log-probabilities of a prompt need every hidden state, beside rows that ask for none."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorafleet.cache.device_tier import DeviceTier
from lorafleet.proto.messages import SamplingParams, SequenceStart, StepPlan, StepResult
from lorafleet.shard.kv_pool import KvPool
from lorafleet.shard.rows import RowTable
from lorafleet.shard.streams import StepStream
from lorafleet.shard.worker import Worker
from tests.checkpoints import make_checkpoint
from tests.shard.test_decoder import CPU, TOKENS, load

PROMPTS = [TOKENS[:20], TOKENS[20:31]]


def first_step(directory: Path, asking: set[int]) -> StepResult:
    """Both prompts in one step; rows of `asking` want their log-probabilities."""
    decoder, rows = load(directory), RowTable(2, 64, CPU)
    part, layers = decoder.partition, decoder.config.num_hidden_layers
    pool = KvPool(layers, 8, part.local_kv_heads, part.head_dim, torch.float32, CPU)
    tier = DeviceTier(0, 0, decoder.layout, torch.float32, CPU)
    decoder.attach_adapters(tier)
    worker = Worker(decoder, rows, pool, tier, Mock(), answers=True)
    starts = [
        SequenceStart(row, prompt, len(prompt), SamplingParams(prompt_logprobs=row in asking))
        for row, prompt in enumerate(PROMPTS)
    ]
    plan = StepPlan(
        1, starts=starts, num_prefills=2, rows=[0, 1], first_positions=[0, 0],
        token_counts=[len(prompt) for prompt in PROMPTS], slots=[0, 0], samples=[True, True],
        new_page_counts=[2, 1], pages=[3, 1, 6],
    )  # fmt: skip
    return worker.finish(worker.launch(StepStream(), plan))


def test_they_are_transformers_own_and_change_nobodys_tokens(tmp_path: Path) -> None:
    directory = make_checkpoint("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.inference_mode():
        logprobs = [model(torch.tensor([prompt])).logits[0].log_softmax(-1) for prompt in PROMPTS]
    expected = [
        [float(row[token]) for row, token in zip(rows, prompt[1:], strict=False)]
        for rows, prompt in zip(logprobs, PROMPTS, strict=True)
    ]
    drawn = [int(rows[-1].argmax()) for rows in logprobs]
    for asking in (set(), {0}, {1}, {0, 1}):
        result = first_step(directory, asking)
        assert list(result.tokens) == drawn
        asked = [value for row in sorted(asking) for value in expected[row]]
        assert list(result.prompt_logprobs) == pytest.approx(asked, abs=1e-4)
