"""Keeps requests in flight: a closed loop of so many at once, or arrivals at their times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from lorafleet.deploy.bench.client import Outcome, ServerError, Target
from lorafleet.deploy.bench.workload import Ask

PROBE_WORDS = 64

OnOutcome = Callable[[Outcome], None]


async def closed_loop(
    target: Target, asks: Sequence[Ask], concurrency: int, on_outcome: OnOutcome
) -> list[Outcome]:
    """Sends all requests, `concurrency` at any time; a finished one is followed at once."""
    pending = iter(asks)
    outcomes: list[Outcome] = []

    async def worker() -> None:
        for ask in pending:
            outcomes.append(await target.send(ask))
            on_outcome(outcomes[-1])

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(asks))):
            group.create_task(worker())
    return outcomes


async def open_loop(target: Target, asks: Sequence[Ask], on_outcome: OnOutcome) -> list[Outcome]:
    """Sends each request at its time, whether or not earlier ones are done."""
    start = time.perf_counter()

    async def send(ask: Ask) -> Outcome:
        await asyncio.sleep(start + ask.at - time.perf_counter())
        outcome = await target.send(ask)
        on_outcome(outcome)
        return outcome

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(send(ask)) for ask in asks]
    return [task.result() for task in tasks]


async def tokens_per_word(target: Target, adapter: str, words: str) -> float:
    """How many tokens the server counts for a word, from one request. Raises ServerError."""
    outcome = await target.send(Ask(adapter, words, 1))
    if outcome.error:
        raise ServerError(outcome.error)
    if not outcome.prompt_tokens:
        raise ServerError("the server does not report usage.prompt_tokens in a stream")
    return outcome.prompt_tokens / len(words.split())
