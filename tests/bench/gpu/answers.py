"""Whether answers from a busy server are those that the same requests get alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import aiohttp

from lorafleet.deploy.bench.client import BASE, Outcome
from lorafleet.deploy.bench.workload import Ask
from tests.bench.gpu.checkpoint import token_ids
from tests.bench.gpu.reports import Row
from tests.bench.gpu.server import Server
from tests.bench.gpu.streams import Load, connection

# Random weights give near ties, which rounding in another batch may turn around: in bf16 each of
# the two tokens' log-probabilities is 0.08 nats from float32's, root mean square, in each of the
# two batches (the part fidelity), their difference 0.17. Three times that.
TIE_NATS = 0.5
_LIKELY = 5  # tokens that may be tied
_COMPARED = 64  # tokens of an answer that are generated again, alone
_OF_BASE = 8  # tokens of the base model's answer


@dataclass(frozen=True, slots=True)
class Pair:
    """One request's tokens from a busy server, and alone."""

    ask: Ask
    busy: list[int]
    alone: list[int]

    @property
    def common(self) -> int:
        """Tokens before the first difference."""
        pairs = enumerate(zip(self.busy, self.alone, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(self.busy), len(self.alone)))


def check_answers(server: Server, adapters: Sequence[str], load: Load, count: int) -> Row:
    """Greedy answers of `count` requests inside a full load, beside the same requests alone.

    Where they differ, the two tokens' log-probabilities after the same text tell rounding (`ties`)
    from a wrong answer (`wrong`). `like_base`: answers that the base model gives as well, which
    says that the adapter did nothing.
    """
    return asyncio.run(_check(server, adapters, load, count))


async def _check(server: Server, adapters: Sequence[str], load: Load, count: int) -> Row:
    asks = load.asks(adapters, server.vocab_size, seed=7)[: load.streams]
    sampled = Random(0).sample(range(len(asks)), min(count, len(asks)))
    async with connection(server.url, server.model) as target:
        busy = await asyncio.gather(*map(target.send, asks))
        pairs, like_base = [], 0
        for number in sampled:
            ask = replace(asks[number], output_tokens=min(load.output_tokens, _COMPARED))
            alone = _tokens(await target.send(ask))
            base = _tokens(await target.send(replace(ask, adapter=BASE, output_tokens=_OF_BASE)))
            like_base += base == alone[:_OF_BASE]
            pairs.append(Pair(ask, _tokens(busy[number])[: len(alone)], alone))
    different = [pair for pair in pairs if pair.busy != pair.alone]
    margins = [await margin(server, pair) for pair in different]
    wrong = sum(margin is None or margin > TIE_NATS for margin in margins)
    return {
        "what": "answers",
        "checked": len(pairs),
        "equal": len(pairs) - len(different),
        "ties": len(different) - wrong,
        "wrong": wrong,
        "like_base": like_base,
        "shortest_common": min(pair.common for pair in pairs),
        "widest_margin_nats": max((m for m in margins if m is not None), default=0.0),
    }


def _tokens(outcome: Outcome) -> list[int]:
    if outcome.error:
        raise RuntimeError(f"adapter {outcome.adapter}: {outcome.error}")
    return token_ids(outcome.text)


async def margin(server: Server, pair: Pair) -> float | None:
    """By how many nats the two tokens differ after what both say; None when one is unlikely."""
    at = pair.common
    if at >= min(len(pair.busy), len(pair.alone)):
        return None
    likely = await likely_tokens(server, pair.ask, pair.alone[:at])
    busy, alone = likely.get(pair.busy[at]), likely.get(pair.alone[at])
    return None if busy is None or alone is None else abs(busy - alone)


async def likely_tokens(server: Server, ask: Ask, said: list[int]) -> dict[int, float]:
    """The log-probabilities of the likeliest tokens after a prompt and what was said."""
    assert isinstance(ask.prompt, list)
    body = {
        "model": ask.adapter,
        "prompt": ask.prompt + said,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": _LIKELY,
        "ignore_eos": True,
    }
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{server.url}/v1/completions", json=body) as response,
    ):
        response.raise_for_status()
        choice = (await response.json())["choices"][0]
    top: dict[str, float] = choice["logprobs"]["top_logprobs"][0]
    return {token_ids(text)[0]: value for text, value in top.items()}
