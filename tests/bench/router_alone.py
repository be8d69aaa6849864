"""The router by itself: a fake shard computes nothing, so what is left is the router's own work."""

from __future__ import annotations

import asyncio
import io
import pstats
import tempfile
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from lorafleet.deploy.bench.client import TIMEOUT, Outcome, Target
from lorafleet.deploy.bench.load import closed_loop
from lorafleet.deploy.bench.report import summarize
from lorafleet.deploy.bench.workload import Length, Popularity, Workload
from tests.bench.router_process import router_over_fake_shard

STREAMS = 256
NEW_TOKENS = 256
ROUNDS = 2
TOKENS_PER_WORD = 6.0  # of the fake shard's tokenizer, about
SHARD = (f"--max-rows={STREAMS}", "--max-step-tokens=4096", "--num-pages=16384", "--num-slots=16")
PROFILED_FUNCTIONS = 30


def measure() -> dict[str, Any]:
    """Tokens per second through SSE at 256 streams, and per second of the router's CPU time."""
    with router_over_fake_shard(SHARD) as router:
        cpu = psutil.Process(router.pid)
        before = cpu.cpu_times()
        summary = asyncio.run(_load(router.url))
        after = cpu.cpu_times()
    seconds = after.user + after.system - before.user - before.system
    return {
        "case": "router alone",
        "streams": STREAMS,
        "tokens_per_cpu_second": ROUNDS * summary["output_tokens"] / seconds,
    } | summary


def profile() -> str:
    """Where the router's time goes under the same load, by cProfile, own time first."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "router.prof"))
        with router_over_fake_shard(SHARD, profile=file) as router:
            asyncio.run(_load(router.url))
        text = io.StringIO()
        pstats.Stats(file, stream=text).sort_stats("tottime").print_stats(PROFILED_FUNCTIONS)
    return text.getvalue()


async def _load(url: str) -> dict[str, Any]:
    workload = Workload(
        adapters=tuple(f"adapter-{i}" for i in range(16)),
        popularity=Popularity("distinct"),
        num_requests=STREAMS,
        prompt_tokens=Length(32, 32),
        output_tokens=Length(NEW_TOKENS, NEW_TOKENS),
    )
    async with aiohttp.ClientSession(
        timeout=TIMEOUT, connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        target = Target(session, url, "openai", "fake", ignore_eos=True)
        for _ in range(ROUNDS):  # the first round opens connections and fetches adapters
            outcomes = await closed_loop(target, workload.asks(TOKENS_PER_WORD), STREAMS, _ignore)
    return summarize(outcomes)


def _ignore(_: Outcome) -> None:
    pass
