"""An adapter whose files change under its name: running requests end with the old, new ones begin
with the new, and neither waits for the other."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp

from tests.e2e.questions import Family, Question
from tests.e2e.service import serve

NAME, NEW_TOKENS = "app", 250


async def test_a_reload_touches_no_running_request(
    family: Callable[[str], Family], tmp_path: Path
) -> None:
    made = family("llama")
    first, second = [q for q in made.questions if q.adapter][:2]
    root = tmp_path / "adapters"
    put(made, first, root)
    flags = ("--num-shard=2", f"--adapter-root={root}", f"--preloaded-adapter-ids={NAME}")
    with serve(made.model, tmp_path, *flags) as service:
        async with service.session() as session:
            whole = [token async for token in stream(session, first.prompt)]
            assert len(whole) == NEW_TOKENS
            assert await ask(session, first) == first.answer

            running = stream(session, first.prompt)
            seen = [await anext(running) for _ in range(5)]
            put(made, second, root)
            assert await ask(session, first) == first.answer, "nobody asked for a reload"
            before = await adapter(session)
            async with session.post("/v1/adapters", json={"adapter_id": NAME, "reload": True}) as r:
                after = await r.json()
                assert r.status == 200, after
            assert service.metric("lorafleet_sequences_running") == 1, "the old one runs on"
            assert before["digest"] != after["digest"]
            assert before["pinned"] == after["pinned"] == "host"
            assert await ask(session, second) == second.answer
            seen += [token async for token in running]
            assert seen == whole
            assert await ask(session, second) == second.answer
            assert await ask(session, first) != first.answer
        held = service.metric("lorafleet_adapter_tier_bytes", tier="host")
        assert held == after["bytes"], "the old content is gone"


def put(made: Family, question: Question, root: Path) -> None:
    """Has the name stand for a question's adapter."""
    shutil.copytree(made.adapter_root / str(question.adapter), root / NAME, dirs_exist_ok=True)


async def stream(session: aiohttp.ClientSession, prompt: str) -> AsyncIterator[int]:
    """The tokens of a long answer as they come."""
    parameters = {"adapter_id": NAME, "max_new_tokens": NEW_TOKENS, "ignore_eos_token": True}
    body = {"inputs": prompt, "parameters": parameters}
    async with session.post("/generate_stream", json=body) as response:
        async for line in response.content:
            if line.startswith(b"data:"):
                yield json.loads(line[5:])["token"]["id"]


async def ask(session: aiohttp.ClientSession, question: Question) -> list[int]:
    parameters = {
        "adapter_id": NAME, "max_new_tokens": question.max_new_tokens, "details": True,
    }  # fmt: skip
    body = {"inputs": question.prompt, "parameters": parameters}
    async with session.post("/generate", json=body) as response:
        answer = await response.json()
        assert response.status == 200, answer
        return [token["id"] for token in answer["details"]["tokens"]]


async def adapter(session: aiohttp.ClientSession) -> dict[str, Any]:
    """What the server says of it."""
    async with session.get("/v1/adapters") as response:
        listed = {found["id"]: found for found in (await response.json())["data"]}
    found: dict[str, Any] = listed[NAME]
    return found
