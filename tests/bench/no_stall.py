"""Do adapters that arrive slow those who are being served? `python -m tests.bench stall`.

Rounds without and with arrivals take turns. An arrival is one adapter at one byte a second, and one
of 300 MB that is downloaded, hashed and packed; both from a server in a process of its own.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import psutil

from lorafleet.deploy.bench.client import BASE, Outcome, Target
from lorafleet.deploy.bench.report import percentiles
from lorafleet.deploy.bench.workload import Ask
from lorafleet.deploy.demo.service import running_service
from tests.bench import random_llama
from tests.bench.gpu.streams import connection, prompt

STREAMS, PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 4, 64, 256, 4
LAYERS, RANK = 16, 512
TRICKLE_SECONDS = 30  # a download is given up then; longer than a round


@dataclass
class Rounds:
    """Milliseconds between tokens, round by round, and the seconds the large adapter took."""

    quiet: list[list[float]] = field(default_factory=list)
    busy: list[list[float]] = field(default_factory=list)
    load_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # of the shard's other threads, a round


def measure() -> dict[str, Any]:
    """The ratio of p99 inter-token times, busy over quiet, and what it is made of."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        random_llama.write(root, layers=LAYERS, num_adapters=0, positions=2048)
        for owner, rank in (("some", RANK), ("slow", 8)):
            random_llama.write_adapter(root / "hub" / owner / "0", rank, LAYERS)
            for number in range(1, ROUNDS):  # the same, by a name of its own
                (root / "hub" / owner / f"{number}").symlink_to("0")
        nbytes = sum(p.stat().st_size for p in (root / "hub" / "some" / "0").iterdir())
        with hub_process(root / "hub") as endpoint:
            os.environ["HF_ENDPOINT"] = endpoint
            flags = ["--model-id", str(root / "model"), "--device", "cpu", "--dtype", "float32"]
            flags += ["--no-prefix-caching", "--adapter-cache-dir", str(root / "cache")]
            flags += ["--adapter-download-seconds", str(TRICKLE_SECONDS)]
            with running_service(flags) as url:
                rounds = asyncio.run(_measure(url))
    return _numbers(rounds, nbytes)


@contextmanager
def hub_process(root: Path) -> Iterator[str]:
    """A hub as far as it matters here, which yields to everything else on this machine."""
    command = [sys.executable, "-m", "tests.bench.slow_hub", str(root)]
    process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        yield process.stdout.readline().strip()
        process.stdin.close()


async def _measure(url: str) -> Rounds:
    rounds = Rounds()
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url}/v1/models") as response:
            model = (await response.json())["data"][0]["id"]
        async with connection(url, model) as target:
            await _streams(target, 0)  # what is done once is done before
            for number in range(ROUNDS):
                rounds.quiet.append(await _streams(target, number))
                loading = asyncio.create_task(_load(session, url, f"some/{number}"))
                slow = asyncio.create_task(_load(session, url, f"slow/{number}"))
                before = _other_threads()
                rounds.busy.append(await _streams(target, number))
                rounds.cpu_seconds.append(_other_threads() - before)
                rounds.load_seconds.append(await loading)
                assert not slow.done(), "the slow adapter has ended"
                await session.delete(f"{url}/v1/adapters/some%2F{number}")
                await asyncio.wait([slow])
    return rounds


async def _load(session: aiohttp.ClientSession, url: str, name: str) -> float:
    """Seconds until the adapter is packed in host memory, or given up."""
    started = time.perf_counter()
    body = {"adapter_id": name, "adapter_source": "hub", "tier": "host"}
    async with session.post(f"{url}/v1/adapters", json=body) as response:
        assert response.status == 200 or name.startswith("slow"), await response.text()
    return time.perf_counter() - started


async def _streams(target: Target, seed: int) -> list[float]:
    """Milliseconds between the tokens of streams of the base model, once all are past prefill."""
    random = Random(seed)

    async def stream() -> Outcome:
        ids = prompt(PROMPT_TOKENS, random_llama.VOCAB_SIZE, random)
        outcome = await target.send(Ask(BASE, ids, NEW_TOKENS))
        assert not outcome.error, outcome.error
        return outcome

    outcomes = await asyncio.gather(*(stream() for _ in range(STREAMS)))
    settled = max(outcome.arrivals[0] for outcome in outcomes)
    return [
        1e3 * (after - before)
        for outcome in outcomes
        for before, after in pairwise(outcome.arrivals)
        if before > settled
    ]


def _other_threads() -> float:
    """CPU seconds of the shard's threads but for those that compute, one a core."""
    for process in psutil.Process().children(recursive=True):
        if "lorafleet.shard" in process.cmdline():
            used = sorted(t.user_time + t.system_time for t in process.threads())
            return float(sum(used[: -(os.cpu_count() or 1)]))
    return 0.0


def _numbers(rounds: Rounds, nbytes: int) -> dict[str, Any]:
    quiet = [percentiles([gap / 1e3 for gap in gaps]) for gaps in rounds.quiet]
    busy = [percentiles([gap / 1e3 for gap in gaps]) for gaps in rounds.busy]
    pairs = list(zip(quiet, busy, strict=True))
    return {
        "case": "no stall",
        "streams": STREAMS,
        "rounds": ROUNDS,
        "large_bytes": nbytes,
        "load_seconds": [round(seconds, 1) for seconds in rounds.load_seconds],
        "load_cpu_seconds": [round(seconds, 1) for seconds in rounds.cpu_seconds],
        "quiet_p99_ms": [round(q["p99"], 1) for q in quiet],
        "busy_p99_ms": [round(b["p99"], 1) for b in busy],
        "quiet_p50_ms": [round(q["p50"], 1) for q in quiet],
        "busy_p50_ms": [round(b["p50"], 1) for b in busy],
        "p99_ratio": statistics.median(b["p99"] / q["p99"] for q, b in pairs),
        "p50_ratio": statistics.median(b["p50"] / q["p50"] for q, b in pairs),
    }
