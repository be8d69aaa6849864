"""First tokens of an idle service by where the adapter is: `python -m tests.bench tiers`."""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from random import Random
from typing import Any

import aiohttp

from lorafleet.deploy.bench.client import BASE, Target
from lorafleet.deploy.bench.workload import Ask
from lorafleet.deploy.demo.service import running_service
from tests.bench import random_llama
from tests.bench.gpu.streams import connection, prompt
from tests.bench.no_stall import hub_process

RANKS, ADAPTERS, PROMPT_TOKENS = (8, 64), 8, 128
TIERS = ("base", "device", "host", "disk", "cold")
# Two places on the device: an adapter of eight is back in host memory when its turn comes again.
_FLAGS = ("--max-active-adapters", "2", "--no-prefix-caching", "--device", "cpu")

_Times = dict[tuple[int, str], list[float]]


def measure() -> dict[str, Any]:
    """Median milliseconds by rank and tier; `cold` is a download from a server on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        random_llama.write(root, num_adapters=0)
        for rank in RANKS:
            for name in _names(rank):
                random_llama.write_adapter(root / "hub" / name, rank)
        times: _Times = defaultdict(list)
        with hub_process(root / "hub") as endpoint:
            os.environ["HF_ENDPOINT"] = endpoint
            flags = ["--model-id", str(root / "model"), *_FLAGS, "--dtype", "float32"]
            flags += ["--adapter-cache-dir", str(root / "cache")]
            for visit in (_first_visit, _second_visit):  # between them the service starts anew
                with running_service(flags) as url:
                    asyncio.run(_measure(url, visit, times))
    return {
        "case": "time to first token",
        "prompt_tokens": PROMPT_TOKENS,
        "requests": ADAPTERS,
        "table_ms": {
            f"rank {rank}": {tier: round(statistics.median(times[rank, tier]), 1) for tier in TIERS}
            for rank in RANKS
        },
    }


def _names(rank: int) -> list[str]:
    return [f"some/r{rank}-{number}" for number in range(ADAPTERS)]


def _first_visit(rank: int) -> list[tuple[str, str]]:
    """Cold; then, each in its turn, from host memory and from the device."""
    names = _names(rank)
    again = [(name, tier) for name in names for tier in ("host", "device")]
    return [*((name, "cold") for name in names), *again, *[(BASE, "base")] * ADAPTERS]


def _second_visit(rank: int) -> list[tuple[str, str]]:
    return [(name, "disk") for name in _names(rank)]


async def _measure(url: str, visit: Any, times: _Times) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url}/v1/models") as response:
            model = (await response.json())["data"][0]["id"]
        async with connection(url, model) as target:
            for _ in range(3):
                await _send(target, BASE)
            for rank in RANKS:
                for name, tier in visit(rank):
                    found = tier if name == BASE else await _tier(session, url, name)
                    assert found == tier, f"{name} is at {found}, not {tier}"
                    times[rank, tier].append(await _send(target, name))


async def _send(target: Target, name: str) -> float:
    ids = prompt(PROMPT_TOKENS, random_llama.VOCAB_SIZE, Random())
    outcome = await target.send(Ask(name, ids, 1))
    assert not outcome.error, outcome.error
    return 1e3 * outcome.first_token_seconds


async def _tier(session: aiohttp.ClientSession, url: str, name: str) -> str:
    async with session.get(f"{url}/v1/adapters") as response:
        adapters = (await response.json())["data"]
    return next((str(each["tier"]) for each in adapters if each["id"] == name), "cold")
