"""Our service against transformers + peft on the same requests: same answers, then how fast."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
from tokenizers import Tokenizer

from lorafleet.deploy.bench.client import BASE, TIMEOUT, Outcome, Target
from lorafleet.deploy.bench.report import summarize
from lorafleet.deploy.bench.workload import Ask
from lorafleet.deploy.demo.service import running_service

REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 16, 128, 64
ROUNDS = 3  # of each measurement; the median counts
CHECKED_BASE_REQUESTS = 4


@dataclass(frozen=True, slots=True)
class Case:
    """A model folder, the adapters asked for, and how it is served."""

    name: str
    folder: Path
    adapters: tuple[str, ...]
    num_shard: int


def compare(case: Case) -> dict[str, Any]:
    """The numbers of a case. Raises AssertionError when our answers differ from peft's."""
    tokenizer = Tokenizer.from_file(str(case.folder / "model" / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    mixed, base = _asks(case.adapters, size, 1), _asks((BASE,), size, 1)
    warm_up = _asks((*case.adapters, BASE), size, 2)
    peft = _peft(case.folder, mixed)
    expected = [*peft["outputs"], *_peft(case.folder, base[:CHECKED_BASE_REQUESTS])["outputs"]]
    flags = ["--model-id", str(case.folder / "model"), "--num-shard", str(case.num_shard)]
    flags += ["--adapter-root", str(case.folder / "adapters"), "--device", "cpu"]
    flags += ["--dtype", "float32", "--no-prefix-caching"]
    with running_service(flags) as url:
        served = asyncio.run(_measure(url, warm_up, mixed, base))
    outcomes = [*served.mixed[0], *served.base[0][:CHECKED_BASE_REQUESTS]]
    prompts = [list(map(int, ask.prompt)) for ask in (*mixed, *base[:CHECKED_BASE_REQUESTS])]
    _check_answers(tokenizer, prompts, outcomes, expected)
    return _numbers(case, peft["seconds"], served)


@dataclass(frozen=True, slots=True)
class _Served:
    mixed: list[list[Outcome]]  # rounds
    base: list[list[Outcome]]


def _asks(adapters: Sequence[str], vocab_size: int, seed: int) -> list[Ask]:
    random = Random(seed)
    return [
        Ask(
            adapters[i % len(adapters)],
            [random.randrange(10, vocab_size) for _ in range(PROMPT_TOKENS)],
            NEW_TOKENS,
        )
        for i in range(REQUESTS)
    ]


def _peft(folder: Path, asks: Sequence[Ask]) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.bench.peft_generate", str(folder)]
    body = json.dumps([asdict(ask) for ask in asks])
    done = subprocess.run(command, input=body, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


async def _measure(url: str, warm_up: list[Ask], mixed: list[Ask], base: list[Ask]) -> _Served:
    async with aiohttp.ClientSession(timeout=TIMEOUT) as session:
        async with session.get(f"{url}/v1/models") as response:
            model = (await response.json())["data"][0]["id"]
        target = Target(session, url, "openai", model, ignore_eos=True)

        async def send(asks: list[Ask]) -> list[Outcome]:
            return await asyncio.gather(*map(target.send, asks))

        await send(warm_up)
        rounds = [(await send(mixed), await send(base)) for _ in range(ROUNDS)]
    return _Served([mixed for mixed, _ in rounds], [base for _, base in rounds])


def _check_answers(
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    outcomes: list[Outcome],
    expected: list[list[int]],
) -> None:
    """A text continues its prompt: it is what the whole sequence says beyond the prompt."""
    for prompt, outcome, ids in zip(prompts, outcomes, expected, strict=True):
        assert not outcome.error, outcome.error
        text = tokenizer.decode(prompt + ids).removeprefix(tokenizer.decode(prompt))
        assert outcome.text == text, f"{outcome.adapter}: {outcome.text!r}, peft {text!r}"


def _numbers(case: Case, peft_seconds: float, served: _Served) -> dict[str, Any]:
    peft = REQUESTS * NEW_TOKENS / peft_seconds
    mixed, base = _speed(served.mixed), _speed(served.base)
    return {
        "case": case.name,
        "requests": REQUESTS,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "adapters": len(case.adapters),
        "num_shard": case.num_shard,
        "peft_tokens_per_second": peft,
        "mixed_tokens_per_second": mixed,
        "base_tokens_per_second": base,
        "mixed_over_peft": mixed / peft,
        "mixed_over_base": mixed / base,
        "mixed": summarize(served.mixed[0]),
        "base": summarize(served.base[0]),
    }


def _speed(rounds: list[list[Outcome]]) -> float:
    speeds: list[float] = [summarize(outcomes)["output_tokens_per_second"] for outcomes in rounds]
    return statistics.median(speeds)
