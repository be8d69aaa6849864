"""Adapters by hub id, from a local server that speaks the hub's API, through the whole service."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorafleet.cache.merging.recipe import MajoritySign, Member, MergeRecipe, Strategy
from lorafleet.proto.messages import AdapterKey
from tests.cache.hub_stand_in import Hub, Repo
from tests.e2e.oracle import Oracle
from tests.e2e.questions import Family, ids_of
from tests.e2e.service import serve

_OWNER = "somebody"
_TOKEN = "hf_letmein"


def _recipe(weights: dict[str, float], *options: Any) -> MergeRecipe:
    members = (Member(AdapterKey("hub", f"{_OWNER}/{name}"), weights[name]) for name in weights)
    return MergeRecipe(tuple(members), *options)


_FOURS = {"r4-qv": 0.7, "r4-gate-k": -1.5}
_EIGHTS = {"r8-rslora": 0.5, "r8-attention": 1.2}
_PROMPT, _NEW = "what do two adapters say of a question like this one", 16
_MERGES = (
    _recipe(_FOURS),
    _recipe(_FOURS, Strategy.TIES, 0.6),
    _recipe(_EIGHTS, Strategy.DARE_LINEAR, 0.7),
    _recipe(_EIGHTS, Strategy.DARE_TIES, 0.5, MajoritySign.FREQUENCY),
)


def _answers(made: Family) -> list[list[int]]:
    """What peft answers with each merge."""
    oracle = Oracle(made.model, made.adapter_root, [*_FOURS, *_EIGHTS])
    for recipe in _MERGES:
        oracle.merge(recipe)
    answers = [oracle.answer(ids_of(_PROMPT), str(recipe.seed), _NEW) for recipe in _MERGES]
    assert len(set(map(tuple, answers))) == len(answers)
    return answers


async def test_hub_adapters_answer_as_peft_does(
    family: Callable[[str], Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = family("llama")
    merges = _answers(made)
    with Hub().serve() as hub:
        for question in made.questions:
            if question.adapter is not None:
                folder = made.adapter_root / question.adapter
                hub.repos[f"{_OWNER}/{question.adapter}"] = Repo(folder)
        hub.repos[f"{_OWNER}/r4-qv"].token = _TOKEN
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        cache = f"--adapter-cache-dir={tmp_path / 'cache'}"
        with serve(made.model, tmp_path, "--num-shard=2", cache) as service:
            async with service.session() as session:

                async def post(
                    chosen: dict[str, Any], prompt: str, new: int
                ) -> tuple[int, list[int]]:
                    parameters = {"max_new_tokens": new, "details": True} | chosen
                    body = {"inputs": prompt, "parameters": parameters}
                    async with session.post("/generate", json=body) as response:
                        answer = await response.json()
                    tokens = answer.get("details", {}).get("tokens", [])
                    return response.status, [t["id"] for t in tokens]

                async def ask_merge(recipe: MergeRecipe, token: str) -> tuple[int, list[int]]:
                    merge = {
                        "ids": [member.key.id for member in recipe.members],
                        "weights": [member.weight for member in recipe.members],
                        "merge_strategy": recipe.strategy,
                        "density": recipe.density,
                        "majority_sign_method": recipe.sign,
                    }
                    chosen = {"merged_adapters": merge, "api_token": token}
                    return await post(chosen, _PROMPT, _NEW)

                async def ask(name: str | None, prompt: str, new: int) -> tuple[int, list[int]]:
                    token = _TOKEN if name == "r4-qv" else None
                    chosen = {"adapter_id": f"{_OWNER}/{name}", "api_token": token}
                    return await post(chosen if name is not None else {}, prompt, new)

                asked = [ask(q.adapter, q.prompt, q.max_new_tokens) for q in made.questions]
                asked += [ask_merge(recipe, _TOKEN) for recipe in _MERGES]
                answers = await asyncio.gather(*asked)
                right = [q.answer for q in made.questions] + merges
                assert answers == [(200, answer) for answer in right]
                assert (await ask("nobodys", "a", 1))[0] == 404
                assert (await ask_merge(_MERGES[0], ""))[0] == 404
                assert await ask_merge(_MERGES[0], _TOKEN) == (200, merges[0])
            assert _TOKEN not in service.log.read_text()
