"""What happens to the service and its processes when one of them ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from pathlib import Path

import aiohttp
import psutil
import pytest

from tests.e2e.questions import Family
from tests.e2e.service import Service, start

_END_SECONDS = 30


@pytest.fixture(scope="module")
def made(family: Callable[[str], Family]) -> Family:
    return family("llama")


def children(service: Service) -> dict[str, psutil.Process]:
    """The service's processes by module: lorafleet.router, lorafleet.shard (the last rank)."""
    found = psutil.Process(service.process.pid).children(recursive=True)
    return {process.cmdline()[process.cmdline().index("-m") + 1]: process for process in found}


def assert_all_gone(processes: list[psutil.Process], service: Service) -> None:
    """No orphan is left and the port can be bound again."""
    _, alive = psutil.wait_procs(processes, _END_SECONDS)
    assert not alive
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", int(service.url.rsplit(":", 1)[1])))


async def test_a_shard_that_dies_takes_the_service_down(made: Family, tmp_path: Path) -> None:
    service = start(made.model, tmp_path, "--num-shard=2")
    processes = children(service)
    body = {"inputs": "a", "parameters": {"max_new_tokens": 400, "ignore_eos_token": True}}
    async with service.session() as session:
        response = await session.post("/generate_stream", json=body)
        await response.content.readline()
        processes["lorafleet.shard"].kill()
        with contextlib.suppress(aiohttp.ClientError):  # the router may end first
            rest = await asyncio.wait_for(response.content.read(), _END_SECONDS)
            assert b'"error_type":"shard_lost"' in rest
    assert service.process.wait(_END_SECONDS) != 0
    log = service.log.read_text()
    assert "shard 1 was killed" in log or "shard 1 exited" in log
    assert_all_gone(list(processes.values()), service)


async def test_a_killed_launcher_leaves_no_orphans(made: Family, tmp_path: Path) -> None:
    service = start(made.model, tmp_path, "--num-shard=2")
    everyone = psutil.Process(service.process.pid).children(recursive=True)
    assert len(everyone) >= 3
    service.process.kill()
    service.process.wait()
    assert_all_gone(everyone, service)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--num-shard=3",), "num_attention_heads 4 is not divisible by --num-shard 3"),
        (("--max-total-tokens=4096",), "--max-total-tokens 4096 exceeds the model's 512"),
    ],
)
def test_what_cannot_be_served_is_said_at_start(
    made: Family, tmp_path: Path, flags: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(AssertionError, match=sentence):
        start(made.model, tmp_path, *flags)


def test_a_model_that_transformers_does_not_know_is_told_without_a_traceback(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(AssertionError, match=r"config.json: .* model type `abacus`") as caught:
        start(tmp_path, tmp_path)
    assert "Traceback" not in str(caught.value)


def test_what_a_config_alone_tells_is_told_once(made: Family, tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as caught:
        start(made.model, tmp_path, "--num-shard=3")
    assert str(caught.value).count("is not divisible by --num-shard 3") == 1
    assert "[shard" not in str(caught.value)
