"""Adapters by hub id, from a local server that speaks the hub's API, through the whole service."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cache.hub_stand_in import Hub, Repo
from tests.e2e.questions import Family
from tests.e2e.service import serve

_OWNER = "somebody"


async def test_hub_adapters_answer_as_peft_does(
    family: Callable[[str], Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = family("llama")
    with Hub().serve() as hub:
        for question in made.questions:
            if question.adapter is not None:
                folder = made.adapter_root / question.adapter
                hub.repos[f"{_OWNER}/{question.adapter}"] = Repo(folder)
        hub.repos[f"{_OWNER}/r4-qv"].token = "hf_letmein"
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        cache = f"--adapter-cache-dir={tmp_path / 'cache'}"
        with serve(made.model, tmp_path, "--num-shard=2", cache) as service:
            async with service.session() as session:

                async def ask(name: str | None, prompt: str, new: int) -> tuple[int, list[int]]:
                    parameters: dict[str, Any] = {"max_new_tokens": new, "details": True}
                    token = "hf_letmein" if name == "r4-qv" else None
                    if name is not None:
                        parameters |= {"adapter_id": f"{_OWNER}/{name}", "api_token": token}
                    body = {"inputs": prompt, "parameters": parameters}
                    async with session.post("/generate", json=body) as response:
                        answer = await response.json()
                    tokens = answer.get("details", {}).get("tokens", [])
                    return response.status, [t["id"] for t in tokens]

                asked = (ask(q.adapter, q.prompt, q.max_new_tokens) for q in made.questions)
                answers = await asyncio.gather(*asked)
                assert answers == [(200, q.answer) for q in made.questions]
                assert (await ask("nobodys", "a", 1))[0] == 404
            assert "hf_letmein" not in service.log.read_text()
