"""The questions of the token tests: 32 requests over several adapters and the base."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from tests.checkpoints import has_experts, make_adapters, make_checkpoint, recipes_of
from tests.e2e.oracle import Oracle
from tests.e2e.service import Service
from tests.expert_adapters import EACH, write_each

_LETTERS = "abcdefghijklmnopqrstuvwxyz "
_NUM_QUESTIONS = 32
_SHARED_PREFIX = 40  # tokens all prompts share, so that prefixes can be reused across requests


@dataclass(frozen=True)
class Question:
    """One request and the token ids that peft answers."""

    prompt: str
    adapter: str | None
    max_new_tokens: int
    answer: list[int]


@dataclass(frozen=True)
class Family:
    """A checkpoint, its adapters, and questions with known answers."""

    model: Path
    adapter_root: Path
    questions: list[Question]


def make_family(name: str, directory: Path) -> Family:
    """Makes a family's folders under `directory` and asks peft."""
    model = make_checkpoint(name, directory / "model")
    recipes = recipes_of(name)
    make_adapters(model, directory / "adapters", recipes)
    names = [recipe.name for recipe in recipes]
    if has_experts(name):
        write_each(model, directory / "adapters" / EACH)
        names.append(EACH)
    oracle = Oracle(model, directory / "adapters", names)
    rng = random.Random(7)
    shared = text(rng, _SHARED_PREFIX)
    questions = []
    for index in range(_NUM_QUESTIONS):
        adapter = [*names, None][index % (len(names) + 1)]
        prompt = shared + text(rng, rng.randint(1, 60))
        new = rng.randint(8, 24)
        answer = oracle.answer(ids_of(prompt), adapter, new)
        questions.append(Question(prompt, adapter, new, answer))
    return Family(model, directory / "adapters", questions)


async def ask_all(service: Service, questions: list[Question]) -> list[list[int]]:
    """Every question at once over HTTP; the token ids of the answers, in order."""
    async with service.session() as session:
        return await asyncio.gather(*(ask(session, question) for question in questions))


async def ask(session: aiohttp.ClientSession, question: Question) -> list[int]:
    """The token ids the service answers greedily."""
    chosen = {"adapter_id": question.adapter, "adapter_source": "local"}
    return await _tokens(session, question, chosen if question.adapter is not None else {})


async def ask_hub(session: aiohttp.ClientSession, question: Question, owner: str) -> list[int]:
    """The same of the hub's OWNER/ADAPTER."""
    chosen = {"adapter_id": f"{owner}/{question.adapter}", "adapter_source": "hub"}
    return await _tokens(session, question, chosen)


async def _tokens(
    session: aiohttp.ClientSession, question: Question, chosen: dict[str, Any]
) -> list[int]:
    parameters: dict[str, Any] = {"max_new_tokens": question.max_new_tokens, "details": True}
    parameters |= chosen
    body = {"inputs": question.prompt, "parameters": parameters}
    async with session.post("/generate", json=body) as response:
        answer = await response.json()
        assert response.status == 200, answer
        return [token["id"] for token in answer["details"]["tokens"]]


def text(rng: random.Random, length: int) -> str:
    """Letters and blanks."""
    return "".join(rng.choice(_LETTERS) for _ in range(length))


def ids_of(text: str) -> list[int]:
    """As `fake_tokenizer` numbers printable ASCII."""
    return [ord(letter) - 0x20 + 3 for letter in text]
