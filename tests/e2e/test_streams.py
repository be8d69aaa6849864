"""One service of two shards: streams, stops, seeds, clients that leave, adapters that are bad."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.e2e.questions import Family, ask, ask_all
from tests.e2e.service import Service, serve

_IDLE_SECONDS = 30


@pytest.fixture(scope="module")
def made(family: Callable[[str], Family]) -> Family:
    return family("llama")


@pytest.fixture(scope="module")
def service(made: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    flags = ("--num-shard=2", f"--adapter-root={made.adapter_root}")
    with serve(made.model, tmp_path_factory.mktemp("service"), *flags) as running:
        yield running


async def frames(
    session: aiohttp.ClientSession, path: str, body: dict[str, Any]
) -> list[dict[str, Any]]:
    """The JSON of every SSE event of a stream, in order."""
    async with session.post(path, json=body) as response:
        assert response.status == 200, await response.text()
        return [
            json.loads(line[5:])
            async for line in response.content
            if line.startswith(b"data:") and b"[DONE]" not in line
        ]


async def generate(session: aiohttp.ClientSession, **parameters: Any) -> dict[str, Any]:
    """A /generate answer with details."""
    prompt = parameters.pop("inputs", "the quick brown fox")
    body = {"inputs": prompt, "parameters": {"max_new_tokens": 24, "details": True} | parameters}
    async with session.post("/generate", json=body) as response:
        assert response.status == 200, await response.text()
        answer: dict[str, Any] = await response.json()
        return answer


def wait_until_idle(service: Service) -> None:
    """Returns once no sequence holds a row or a page."""
    deadline = time.monotonic() + _IDLE_SECONDS
    held = ("lorafleet_sequences_running", "lorafleet_sequences_waiting", "lorafleet_kv_pages_used")
    while any(service.metric(name) for name in held):
        assert time.monotonic() < deadline, "sequences or pages are still held"
        time.sleep(0.05)


@pytest.mark.parametrize("adapter", [None, "r16-all"])
async def test_a_stream_carries_what_the_whole_answer_says(
    service: Service, adapter: str | None
) -> None:
    chosen = {"adapter_id": adapter, "adapter_source": "local"} if adapter else {}
    async with service.session() as session:
        whole = await generate(session, **chosen)
        parameters = {"max_new_tokens": 24, "details": True} | chosen
        body = {"inputs": "the quick brown fox", "parameters": parameters}
        stream = await frames(session, "/generate_stream", body)
    tokens = [frame["token"] for frame in stream]
    assert [t["id"] for t in tokens] == [t["id"] for t in whole["details"]["tokens"]]
    assert "".join(t["text"] for t in tokens) == whole["generated_text"]
    assert stream[-1]["generated_text"] == whole["generated_text"]
    assert all(frame["generated_text"] is None for frame in stream[:-1])
    assert stream[-1]["details"]["generated_tokens"] == len(tokens)
    assert whole["details"]["prompt_tokens"] == len("the quick brown fox")


async def test_openai_streams_count_usage(service: Service) -> None:
    body: dict[str, Any] = {
        "model": "r8-attention",
        "prompt": "the quick brown fox",
        "max_tokens": 20,
        "temperature": 0,
        "ignore_eos": True,
    }
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with service.session() as session:
        async with session.post("/v1/completions", json=body) as response:
            whole = await response.json()
        stream = await frames(session, "/v1/completions", body | options)
    text = "".join(choice["text"] for frame in stream for choice in frame["choices"])
    assert text == whole["choices"][0]["text"]
    assert stream[-1]["usage"] == whole["usage"]
    prompt, total = len("the quick brown fox"), whole["usage"]["total_tokens"]
    assert whole["usage"]["prompt_tokens"] == prompt
    assert total == prompt + whole["usage"]["completion_tokens"]


async def test_a_stop_string_across_tokens_ends_both_kinds_of_answer(service: Service) -> None:
    async with service.session() as session:
        whole = (await generate(session, max_new_tokens=40))["generated_text"]
        stop = whole[5:8]  # one token a byte: three letters are at least three tokens
        cut = whole.index(stop)
        lorax = await generate(session, max_new_tokens=40, stop=[stop])
        body = {"model": "", "prompt": "the quick brown fox", "max_tokens": 40}
        body |= {"temperature": 0, "stop": stop}
        async with session.post("/v1/completions", json=body) as response:
            openai = (await response.json())["choices"][0]
    assert lorax["generated_text"] == whole[: cut + len(stop)]
    assert lorax["details"]["finish_reason"] == "stop_sequence"
    assert (openai["text"], openai["finish_reason"]) == (whole[:cut], "stop")
    wait_until_idle(service)


async def test_a_seed_gives_the_same_text_alone_and_in_a_crowd(
    service: Service, made: Family
) -> None:
    sampling = {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "seed": 1234}
    async with service.session() as session:
        alone = await generate(session, **sampling)
        crowd = asyncio.gather(*(ask(session, question) for question in made.questions))
        together = await generate(session, **sampling)
        await crowd
        other = await generate(session, **sampling | {"seed": 1235})
    assert together["generated_text"] == alone["generated_text"] != other["generated_text"]
    assert alone["details"]["seed"] == 1234


async def test_clients_that_leave_free_what_they_held(service: Service, made: Family) -> None:
    body = {
        "inputs": "the quick brown fox",
        "parameters": {
            "max_new_tokens": 400,
            "ignore_eos_token": True,
            "adapter_id": "r4-qv",
            "adapter_source": "local",
        },
    }

    async def leave_after_first_token() -> None:
        async with session.post("/generate_stream", json=body) as response:
            await response.content.readline()

    async with service.session() as session:
        await asyncio.gather(*(leave_after_first_token() for _ in range(40)))
        wait_until_idle(service)
        stayed = made.questions[0]
        assert await ask(session, stayed) == stayed.answer


async def test_bad_adapters_fail_alone(service: Service, made: Family) -> None:
    for name, damage in _DAMAGES.items():
        _copy_adapter(made.adapter_root, "r8-attention", name)
        damage(made.adapter_root / name)
    (made.adapter_root / "escape").symlink_to(made.model)

    async def status(name: str) -> tuple[int, str]:
        parameters = {"adapter_id": name, "adapter_source": "local", "max_new_tokens": 4}
        async with session.post(
            "/generate", json={"inputs": "a", "parameters": parameters}
        ) as response:
            return response.status, (await response.json())["error"]

    names = [*_DAMAGES, "escape", "no-such-adapter"]
    async with service.session() as session:
        failing = asyncio.gather(*(status(name) for name in names))
        assert await ask_all(service, made.questions) == [q.answer for q in made.questions]
        found = dict(zip(names, await failing, strict=True))
    assert found["no-such-adapter"][0] == 404
    assert found["escape"][0] == 404
    assert all(found[name][0] == 422 for name in _DAMAGES), found
    assert "use_dora" in found["dora"][1]
    assert "self_attn.k_proj has shape [8, 128]" in found["wrong-base"][1]
    wait_until_idle(service)


def _copy_adapter(root: Path, source: str, name: str) -> None:
    (root / name).mkdir()
    for path in (root / source).iterdir():
        (root / name / path.name).write_bytes(path.read_bytes())


def _edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def _wrong_base(folder: Path) -> None:
    """The same modules of a model twice as wide."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    wider = {k: t.repeat(1, 2) if "lora_A" in k else t.repeat(2, 1) for k, t in tensors.items()}
    save_file(wider, path)


def _truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _cut_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


_DAMAGES: dict[str, Callable[[Path], None]] = {
    "dora": _edit_config(use_dora=True),
    "wrong-base": _wrong_base,
    "truncated": _truncate,
    "no-weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "not-json": _cut_config,
}
