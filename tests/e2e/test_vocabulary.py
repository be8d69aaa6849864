"""Adapters that change the vocabulary, over HTTP: token for token what peft answers.

Those with added tokens ship a tokenizer that has them, and with it their prompts are encoded.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from lorafleet.deploy.cli import main
from tests import fake_tokenizer
from tests.checkpoints import EOS, RECIPES, make_adapters, make_checkpoint
from tests.e2e.oracle import Oracle
from tests.e2e.service import Service, serve
from tests.fake_tokenizer import VOCAB_SIZE
from tests.vocabulary_cases import CASES, Case, load_case, make_case

PLAIN = RECIPES[2]
NEW_TOKENS = 10
TEMPLATE = "{% for m in messages %}<|new0|>{{ m.role }}: {{ m.content }}<|new1|>{% endfor %}<s>"
NAMES = (
    "lora-both", "saved-both", "tokens", "tokens-different", "resized", "resized-saved",
    "resized-tokens", "smaller",
)  # fmt: skip
ENDING = "resized"  # whose tokenizer ends texts with an added token
CHATTING = "resized-saved"  # which has a template


@dataclass(frozen=True)
class Ask:
    """A prompt, whom it is for, and peft's answer."""

    adapter: str | None
    prompt: str
    answer: list[int]


@dataclass(frozen=True)
class Made:
    """Folders, questions, and one chat with its answer."""

    model: Path
    adapters: Path
    asks: list[Ask]
    chat: list[dict[str, str]]
    chat_answer: str
    prefill: list[float]  # log-probabilities of the prompt of CHATTING, but for its first token


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    @cache
    def make(family: str) -> Made:
        folder = tmp_path_factory.mktemp(family)
        return _make(family, folder / "model", folder / "adapters")

    return make


def _make(family: str, model: Path, adapters: Path) -> Made:
    make_checkpoint(family, model)
    make_adapters(model, adapters, (PLAIN,))
    asks, chat = [], [{"role": "user", "content": "Hello there"}]
    chat_answer, prefill = "", [0.0]
    for case in (case for case in CASES if case.name in NAMES):
        make_case(case, model, adapters / case.name)
        prompt = "A prompt for " + case.name
        if case.num_tokens > VOCAB_SIZE:
            _ship_tokenizer(case, adapters / case.name)
            prompt += "<|new1|> and <|new0|>"
        tokenizer = _tokenizer(case, adapters, model)
        eos = [EOS, VOCAB_SIZE] if case.name == ENDING else [EOS]
        peft = load_case(case, model, adapters / case.name)
        asks.append(Ask(case.name, prompt, _generate(peft, tokenizer.encode(prompt), eos)))
        if case.name == CHATTING:
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True).input_ids
            chat_answer = tokenizer.decode(_generate(peft, ids, eos), skip_special_tokens=True)
            prefill = _prefill(peft, tokenizer.encode(prompt))
    oracle = Oracle(model, adapters, [PLAIN.name])
    for name in (None, PLAIN.name):
        ids = _tokenizer(None, adapters, model).encode("As ever")
        asks.append(Ask(name, "As ever", oracle.answer(ids, name, NEW_TOKENS)))
    return Made(model, adapters, asks, chat, chat_answer, prefill)


def _prefill(peft: Any, ids: list[int]) -> list[float]:
    with torch.no_grad():
        logprobs = peft(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    found: list[float] = logprobs.gather(1, torch.tensor(ids[1:]).unsqueeze(1))[:, 0].tolist()
    return found


def _ship_tokenizer(case: Case, directory: Path) -> None:
    """The base's with tokens for the added rows, as transformers saves it."""
    file = Tokenizer.from_str(fake_tokenizer.tokenizer_json().decode())
    count = case.num_tokens - VOCAB_SIZE
    file.add_special_tokens([AddedToken(f"<|new{i}|>", special=i < 1) for i in range(count)])
    eos = "<|new0|>" if case.name == ENDING else "</s>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=file, bos_token="<s>", eos_token=eos)
    if case.name == CHATTING:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)


def _tokenizer(case: Case | None, adapters: Path, model: Path) -> Any:
    own = case is not None and case.num_tokens > VOCAB_SIZE
    folder = adapters / case.name if own and case else model
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _generate(peft: Any, ids: list[int], eos: list[int]) -> list[int]:
    inputs = torch.tensor([ids])
    with torch.no_grad():
        output = peft.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), do_sample=False,
            max_new_tokens=NEW_TOKENS, eos_token_id=eos,
        )  # fmt: skip
    found: list[int] = output[0, len(ids) :].tolist()
    return found


async def _answer(session: aiohttp.ClientSession, ask: Ask) -> list[int]:
    parameters: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "details": True}
    if ask.adapter is not None:
        parameters |= {"adapter_id": ask.adapter, "adapter_source": "local"}
    body = {"inputs": ask.prompt, "parameters": parameters}
    async with session.post("/generate", json=body) as response:
        answer = await response.json()
        assert response.status == 200, (ask, answer)
        return [token["id"] for token in answer["details"]["tokens"]]


async def _prompt_logprobs(service: Service, made: Made) -> list[float]:
    [prompt] = [ask.prompt for ask in made.asks if ask.adapter == CHATTING]
    parameters = {"adapter_id": CHATTING, "adapter_source": "local", "max_new_tokens": 1}
    body = {"inputs": prompt, "parameters": parameters | {"decoder_input_details": True}}
    async with service.session() as session, session.post("/generate", json=body) as response:
        answer = await response.json()
    return [token["logprob"] for token in answer["details"]["prefill"][1:]]


async def _answers(service: Service, asks: list[Ask]) -> dict[str | None, list[int]]:
    async with service.session() as session:
        found = await asyncio.gather(*(_answer(session, ask) for ask in asks))
    return {ask.adapter: tokens for ask, tokens in zip(asks, found, strict=True)}


@pytest.mark.parametrize(("family", "num_shard"), [("llama", 1), ("qwen2", 2)])
async def test_every_answer_of_a_mixed_batch_is_pefts(
    made: Callable[[str], Made], family: str, num_shard: int, tmp_path: Path
) -> None:
    mine = made(family)
    flags = (f"--num-shard={num_shard}", f"--adapter-root={mine.adapters}")
    wanted = {ask.adapter: ask.answer for ask in mine.asks}
    assert any(max(answer) >= VOCAB_SIZE for answer in wanted.values())
    assert wanted[ENDING][-1] == VOCAB_SIZE or VOCAB_SIZE not in wanted[ENDING]
    with serve(mine.model, tmp_path, *flags) as service:
        assert await _answers(service, mine.asks) == wanted
        assert service.metric("lorafleet_step_adapters_max") > 2
        body = {"model": CHATTING, "messages": mine.chat, "max_tokens": NEW_TOKENS}
        body |= {"temperature": 0, "adapter_source": "local"}
        async with (
            service.session() as session,
            session.post("/v1/chat/completions", json=body) as response,
        ):
            answer = await response.json()
        assert answer["choices"][0]["message"]["content"] == mine.chat_answer
        assert await _prompt_logprobs(service, mine) == pytest.approx(mine.prefill, abs=1e-3)


def test_check_says_what_the_server_would(
    made: Callable[[str], Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = made("llama")
    paths = [str(mine.adapters / name) for name in NAMES]
    flags = (f"--model-id={mine.model}", "--num-shard=2", "--json")
    assert main(["adapters", "check", *paths, *flags]) == 0
    verdicts = {Path(v["path"]).name: v for v in json.loads(capsys.readouterr().out)}
    assert verdicts["lora-both"]["target_modules"] == ["embed_tokens", "lm_head", "q_proj"]
    assert verdicts["saved-both"]["packed_bytes"] > verdicts["tokens"]["packed_bytes"]
    bad = tmp_path / "bad"
    shutil.copytree(mine.adapters / ENDING, bad)
    (bad / "tokenizer.json").write_text("{}")
    assert main(["adapters", "check", str(bad), *flags]) == 1
    assert "tokenizer.json is not a tokenizer" in capsys.readouterr().out
