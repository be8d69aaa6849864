"""Concurrent requests of random tokens to a server that speaks the OpenAI interface."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random

import aiohttp

from lorafleet.deploy.bench.client import TIMEOUT, Outcome, Target
from lorafleet.deploy.bench.load import closed_loop
from lorafleet.deploy.bench.report import summarize
from lorafleet.deploy.bench.workload import Ask
from tests.bench.gpu.reports import Row


@dataclass(frozen=True, slots=True)
class Load:
    """`streams` requests at any time, `rounds` times as many in all; lengths in tokens."""

    streams: int = 64
    rounds: int = 4
    prompt_tokens: int = 400
    output_tokens: int = 160

    def asks(self, adapters: Sequence[str], vocab_size: int, seed: int) -> list[Ask]:
        """Random prompts, one adapter after the other."""
        random, count = Random(seed), self.streams * self.rounds
        return [
            Ask(adapters[i % len(adapters)], prompt(self.prompt_tokens, vocab_size, random),
                self.output_tokens)
            for i in range(count)
        ]  # fmt: skip


def prompt(tokens: int, vocab_size: int, random: Random) -> list[int]:
    """Random token ids."""
    return random.choices(range(vocab_size), k=tokens)


@asynccontextmanager
async def connection(url: str, model: str) -> AsyncIterator[Target]:
    """A server as the bench client sees it; no answer ends before its length."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=TIMEOUT, connector=connector) as session:
        yield Target(session, url, "openai", model, ignore_eos=True)


def send(url: str, model: str, asks: Sequence[Ask], streams: int) -> list[Outcome]:
    """Sends them, `streams` at any time. Raises RuntimeError when one fails: the run is void."""
    return asyncio.run(_send(url, model, asks, streams))


async def _send(url: str, model: str, asks: Sequence[Ask], streams: int) -> list[Outcome]:
    async with connection(url, model) as target:
        outcomes = await closed_loop(target, asks, streams, lambda _: None)
    for outcome in outcomes:
        if outcome.error:
            raise RuntimeError(f"{url}, adapter {outcome.adapter}: {outcome.error}")
    return outcomes


def describe(what: str, load: Load, outcomes: Sequence[Outcome]) -> Row:
    """Tokens per second, and milliseconds to the first token and between tokens."""
    summary = summarize(outcomes)
    return {
        "what": what,
        "streams": load.streams,
        "requests": summary["requests"],
        "adapters": summary["adapters"],
        "prompt_tokens": load.prompt_tokens,
        "output_tokens": load.output_tokens,
        "tokens_per_s": summary["output_tokens_per_second"],
        "ttft_p50_ms": summary["ttft_ms"]["p50"],
        "ttft_p99_ms": summary["ttft_ms"]["p99"],
        "inter_token_p50_ms": summary["inter_token_ms"]["p50"],
        "inter_token_p99_ms": summary["inter_token_ms"]["p99"],
    }


def line(name: str, row: Row) -> str:
    """One measurement as a line of the log."""
    return (
        f"{name} {row['what']:16} {row['tokens_per_s']:8,.0f} tokens/s  "
        f"first token {row['ttft_p50_ms']:6.1f} / {row['ttft_p99_ms']:6.1f} ms  "
        f"between tokens {row['inter_token_p50_ms']:5.2f} / {row['inter_token_p99_ms']:6.2f} ms"
    )
