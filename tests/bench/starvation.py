"""A lone request beside a flood: one adapter gets 500 requests at once, another gets one."""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import aiohttp

from lorafleet.deploy.bench.client import TIMEOUT, Outcome, Target
from lorafleet.deploy.bench.workload import Ask
from lorafleet.deploy.demo.service import running_service
from tests.bench import random_llama

FLOOD, MAX_ROWS = 500, 16
HIDDEN_SIZE, NUM_LAYERS = 128, 2
PROMPT_TOKENS, NEW_TOKENS = 64, 32
LONE_REQUESTS = 5  # one after another, each with a prompt of its own


@dataclass(frozen=True, slots=True)
class _Times:
    unloaded: list[tuple[float, int]]  # seconds and steps of each lone request, before and after
    loaded: list[tuple[float, int]]
    flood: list[Outcome]  # done before the last lone request was


def measure(folder: Path) -> dict[str, Any]:
    """How much longer a lone request takes beside the flood, on a random Llama in `folder`."""
    random_llama.write(folder, hidden_size=HIDDEN_SIZE, layers=NUM_LAYERS)
    flags = ["--model-id", str(folder / "model"), "--adapter-root", str(folder / "adapters")]
    flags += ["--device", "cpu", "--dtype", "float32", "--max-batch-size", str(MAX_ROWS)]
    with running_service(flags) as url:
        times = asyncio.run(_measure(url))
    assert not any(outcome.error for outcome in times.flood), "a request of the flood failed"
    unloaded, unloaded_steps = (
        statistics.median(values) for values in zip(*times.unloaded, strict=True)
    )
    loaded, loaded_steps = (statistics.median(values) for values in zip(*times.loaded, strict=True))
    return {
        "case": "a lone request beside a flood",
        "flood": FLOOD,
        "rows": MAX_ROWS,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "unloaded_seconds_and_steps": times.unloaded,
        "loaded_seconds_and_steps": times.loaded,
        "median_ratio": loaded / unloaded,
        "median_ratio_of_steps": loaded_steps / unloaded_steps,
        "flood_done": len(times.flood),
    }


async def _measure(url: str) -> _Times:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=TIMEOUT, connector=connector) as session:
        target = Target(session, url, "openai", str(url), ignore_eos=True)
        random = Random(0)

        async def lone() -> tuple[float, int]:
            before = await _steps(session, url)
            outcome = await target.send(_ask("a1", random))
            assert not outcome.error, outcome.error
            return outcome.total_seconds, await _steps(session, url) - before

        await target.send(_ask("a0", random))  # both adapters are on the device
        await lone()
        unloaded = [await lone() for _ in range(LONE_REQUESTS)]
        tasks = [asyncio.create_task(target.send(_ask("a0", random))) for _ in range(FLOOD)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        loaded = [await lone() for _ in range(LONE_REQUESTS)]
        done = [task.result() for task in tasks if task.done()]
        assert len(done) < FLOOD - MAX_ROWS, "the flood was over before the lone requests"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        unloaded += [await lone() for _ in range(LONE_REQUESTS)]
        return _Times(unloaded, loaded, done)


async def _steps(session: aiohttp.ClientSession, url: str) -> int:
    """Steps the router has sent; unlike seconds, not a matter of what else the machine does."""
    async with session.get(f"{url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return round(float(next(x for x in lines if x.startswith("lorafleet_steps_total")).split()[1]))


def _ask(adapter: str, random: Random) -> Ask:
    prompt = [random.randrange(10, random_llama.VOCAB_SIZE) for _ in range(PROMPT_TOKENS)]
    return Ask(adapter, prompt, NEW_TOKENS)
