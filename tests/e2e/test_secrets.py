"""A caller's token is in no log, metric, list, error, file or command line."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from safetensors.torch import load_file

from tests.cache.hub_stand_in import Hub, Repo
from tests.checkpoints import RECIPES, make_adapters, make_checkpoint
from tests.e2e.service import Service, serve

_MARK = "ZebraQuartz7"  # in every token of this file
_RIGHT, _WRONG = f"hf_right{_MARK}", f"hf_wrong{_MARK}"
# Where Python looks for it at its start: every logger of every library says all it can.
_VERBOSE = """
import logging
configure = logging.basicConfig
logging.basicConfig = lambda **options: configure(**options | {"level": logging.DEBUG})
"""
_GET = ("/metrics", "/v1/models", "/v1/adapters", "/info")


@pytest.fixture
def hub(tmp_path: Path) -> Any:
    """Repositories whose names are the statuses they are answered with."""
    make_checkpoint("llama", tmp_path / "model")
    make_adapters(tmp_path / "model", tmp_path / "adapters", RECIPES[:2])
    good = tmp_path / "adapters" / RECIPES[1].name
    bad = tmp_path / "adapters" / "bad"
    bad.mkdir()
    config = json.loads((good / "adapter_config.json").read_text()) | {"peft_type": "IA3"}
    (bad / "adapter_config.json").write_text(json.dumps(config))
    weights = "adapter_model.safetensors"
    (bad / weights).write_bytes((good / weights).read_bytes())
    assert load_file(bad / weights)
    with Hub().serve() as hub:
        hub.repos["some/200"] = Repo(good, _RIGHT)
        hub.repos["other/200"] = Repo(good, _RIGHT)
        hub.repos["some/403"] = Repo(good, "hf_somebody_elses", is_gated=True)
        hub.repos["private/404"] = Repo(good, "hf_somebody_elses")
        hub.repos["some/422"] = Repo(bad, _RIGHT)
        hub.repos["some/502"] = Repo(good, _RIGHT, status=500)
        hub.repos["some/504"] = Repo(good, _RIGHT)
        hub.repos["some/504"].gate.clear()
        yield hub


_NAMES = ("200", "403", "404", "422", "502", "504")


async def _send(
    session: aiohttp.ClientSession, path: str, body: Any, token: str, place: str
) -> tuple[int, str]:
    """The status and everything else of an answer; `place` says where the token goes."""
    headers = {"Authorization": f"Bearer {token}"} if place == "header" else {}
    if place == "body":
        body.get("parameters", body)["api_token"] = token
    async with session.post(path, json=body, headers=headers) as response:
        return response.status, f"{dict(response.headers)} {await response.text()}"


async def _ask(
    session: aiohttp.ClientSession, path: str, token: str, place: str, **chosen: Any
) -> tuple[int, str]:
    if path.startswith("/v1"):
        model = chosen.pop("adapter_id")
        messages = [{"role": "user", "content": "a"}]
        text = {"messages": messages} if "chat" in path else {"prompt": "a"}
        body = {"model": model, "max_tokens": 2} | text | chosen
        return await _send(session, path, body, token, place)
    parameters = {"max_new_tokens": 2} | chosen
    return await _send(session, path, {"inputs": "a", "parameters": parameters}, token, place)


async def test_a_token_is_found_nowhere(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "verbose").mkdir()
    (tmp_path / "verbose" / "sitecustomize.py").write_text(_VERBOSE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "verbose"))
    monkeypatch.setenv("GRPC_VERBOSITY", "DEBUG")
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    cache = tmp_path / "cache"
    flags = (f"--adapter-cache-dir={cache}", "--adapter-answer-seconds=0.5")
    with serve(tmp_path / "model", tmp_path, "--num-shard=2", *flags) as service:
        answers = await _drive(service)
        assert hub.tokens.count(_RIGHT) > 0, "the token was never used"
        lines = [p.cmdline() for p in psutil.Process(service.process.pid).children(recursive=True)]
        assert _MARK not in repr(lines)
    for answer in answers:
        assert _MARK not in answer, answer
    log = service.log.read_text()
    assert "DEBUG router: " in log
    assert "DEBUG send_request_headers" in log, "the shards were not verbose"
    assert _MARK not in log
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert any(path.name == "download.json" for path in files)
    assert [path for path in files if _MARK.encode() in path.read_bytes()] == []


async def _drive(service: Service) -> list[str]:
    """Success and each failure, by each route, with the token in each place; all that was said."""
    said = []
    async with service.session() as session:
        routes = ("/generate", "/generate_stream", "/v1/completions", "/v1/chat/completions")
        for name in _NAMES:
            asked = [
                _ask(session, path, _RIGHT, place, adapter_id=f"some/{name}")
                for path in routes
                for place in ("body", "header")
            ]
            for status, text in await asyncio.gather(*asked):
                assert status == int(name), text
                said.append(text)
        for expected, call in (
            (404, _ask(session, "/generate", _WRONG, "body", adapter_id="some/200")),
            (404, _ask(session, "/generate", _RIGHT, "body", adapter_id="private/404")),
            (403, _ask(session, "/generate", f"{_MARK} é", "body", adapter_id="some/200")),
            (422, _ask(session, "/generate", "", "", adapter_id="some/200", api_token=[_RIGHT])),
            (200, _ask(session, "/generate", _RIGHT, "body", merged_adapters=_merge("other/200"))),
            (404, _ask(session, "/generate", _RIGHT, "body", merged_adapters=_merge("some/404"))),
            (200, _send(session, "/v1/adapters", {"adapter_id": "some/200"}, _RIGHT, "body")),
            (422, _send(session, "/v1/adapters", {"adapter_id": "some/422"}, _RIGHT, "body")),
            (404, _send(session, "/v1/load_lora_adapter", _LOAD, _RIGHT, "body")),
        ):
            status, text = await call
            assert status == expected, text
            said.append(text)
        for path in _GET:
            async with session.get(path) as response:
                assert response.status == 200
                said.append(await response.text())
    return said


_LOAD = {"lora_name": "name", "lora_path": "some/404"}


def _merge(name: str) -> dict[str, Any]:
    return {"ids": ["some/200", name], "weights": [1, 1]}
