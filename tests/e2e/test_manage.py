"""Adapters managed on a running service of two shards, over HTTP and by the command."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from lorafleet.deploy.cli import main
from tests.checkpoints import RECIPES, SCALING_RECIPES
from tests.e2e.questions import Family
from tests.e2e.service import Service, serve

ADMIN = "the-admins-own-key"


def command(*argv: str, key: str = ADMIN) -> tuple[int, str]:
    """`lorafleet adapters`: its exit status and what it says."""
    line = [sys.executable, "-P", "-m", "lorafleet.deploy", "adapters", *argv]
    environment = os.environ | {"ADMIN_API_KEY": key, "COLUMNS": "200"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    return done.returncode, done.stdout + done.stderr


async def ask(service: Service, name: str, prompt: str, new: int) -> list[int]:
    """The tokens of a greedy answer."""
    body = {
        "inputs": prompt,
        "parameters": {"adapter_id": name, "max_new_tokens": new, "details": True},
    }
    async with service.session() as session, session.post("/generate", json=body) as response:
        answer = await response.json()
        assert response.status == 200, answer
        return [token["id"] for token in answer["details"]["tokens"]]


async def test_load_list_pin_alias_and_drop_while_running(
    family: Callable[[str], Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = family("llama")
    questions = {q.adapter: q for q in made.questions if q.adapter}
    first, second = list(questions.values())[:2]
    monkeypatch.setenv("ADMIN_API_KEY", ADMIN)
    root = f"--adapter-root={made.adapter_root}"
    preloaded = f"--preloaded-adapter-ids={second.adapter}"
    with serve(made.model, tmp_path, "--num-shard=2", root, preloaded) as service:
        url = f"--url={service.url}"

        async def run(*argv: str) -> Any:
            code, said = await asyncio.to_thread(command, *argv, url, "--json")
            assert code == 0, said
            return json.loads(said)

        before = {adapter["id"]: adapter for adapter in await run("list")}
        assert before[str(second.adapter)]["pinned"] == "host"
        assert before[str(first.adapter)]["tier"] == "disk"
        await run("load", str(first.adapter), "--alias=prod", "--tier=device")
        pinned = await run("pin", "prod", "--device")
        assert (pinned["id"], pinned["pinned"]) == (first.adapter, "device")
        assert (pinned["tier"], pinned["aliases"]) == ("device", ["prod"])
        assert await ask(service, "prod", first.prompt, first.max_new_tokens) == first.answer
        for spelling in (f"{made.adapter_root}/{first.adapter}", f"./{first.adapter}/"):
            same = await run("load", spelling)
            assert (same["id"], same["pinned"]) == (first.adapter, "device")
        await run("load", str(second.adapter), "--alias=prod")
        assert await ask(service, "prod", second.prompt, second.max_new_tokens) == second.answer
        assert (await asyncio.to_thread(command, "list", url, key="wrong"))[0] == 1
        await _drop_while_running(service, run, str(first.adapter))
        again = await ask(service, str(first.adapter), first.prompt, first.max_new_tokens)
        assert again == first.answer
        hits = {"adapter": str(first.adapter), "source": "local"}
        assert service.metric("lorafleet_adapter_hits_total", **hits, tier="device") >= 1
        assert service.metric("lorafleet_adapter_requests_total", **hits) >= 2
        lines = [p.cmdline() for p in psutil.Process(service.process.pid).children(recursive=True)]
        assert not any(ADMIN in word for line in lines for word in line)
    assert ADMIN not in service.log.read_text()


async def _drop_while_running(service: Service, run: Any, name: str) -> None:
    parameters = {"adapter_id": name, "max_new_tokens": 300, "ignore_eos_token": True}
    async with service.session() as session:
        body = {"inputs": "a", "parameters": parameters}
        stream = await session.post("/generate_stream", json=body)
        await stream.content.readline()
        dropping = asyncio.create_task(run("drop", f"./{name}/"))
        frames = (await stream.content.read()).decode().split("\n\n")
        assert '"finish_reason"' in frames[-2] or '"generated_text":"' in frames[-2]
        assert sum("data:" in frame for frame in frames) >= 299, "the request ran to its end"
        assert (await dropping)["deleted"] is True
    held = {adapter["id"]: adapter for adapter in await run("list")}
    assert (held[name]["tier"], held[name]["pinned"]) == ("disk", None)


def test_check_gates_a_pipeline(
    family: Callable[[str], Family], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = family("llama")
    config = tmp_path / "model"
    config.mkdir()
    (config / "config.json").write_bytes((made.model / "config.json").read_bytes())
    good = sorted(str(made.adapter_root / recipe.name) for recipe in RECIPES + SCALING_RECIPES)
    flags = (f"--model-id={config}", "--num-shard=2", "--json")
    assert main(["adapters", "check", *good, *flags]) == 0
    verdicts = json.loads(capsys.readouterr().out)
    assert {verdict["served"] for verdict in verdicts} == {True}
    assert {v["rank"] for v in verdicts if v["path"].endswith("r64-down")} == {64}
    assert main(["adapters", "check", *good, f"--model-id={made.model}"]) == 0
    capsys.readouterr()
    bad = tmp_path / "bad"
    bad.mkdir()
    adapter = json.loads((Path(good[0]) / "adapter_config.json").read_text()) | {"use_qalora": True}
    (bad / "adapter_config.json").write_text(json.dumps(adapter))
    weights = (Path(good[0]) / "adapter_model.safetensors").read_bytes()
    (bad / "adapter_model.safetensors").write_bytes(weights)
    assert main(["adapters", "check", good[0], str(bad), f"--model-id={config}"]) == 1
    said = capsys.readouterr().out
    assert "refused" in said
    assert f"{bad}: use_qalora is set, which is not served." in said
    assert main(["adapters", "check", good[0], f"--model-id={tmp_path / 'nowhere'}"]) == 2
    assert "--model-id" in capsys.readouterr().err
