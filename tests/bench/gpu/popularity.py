"""Punica's four popularities and its lengths (Chen et al., MLSys 2024, section 7): seeded, pure.

For n requests:

- distinct: n adapters, one request each.
- uniform: ceil(sqrt(n)) adapters, equally.
- skewed: adapter i is asked for floor(1.5^i) times, the last one for what is left.
- identical: one adapter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

LAWS = ("distinct", "uniform", "skewed", "identical")
SEED = 0xABCDABCD987
_GROWTH = 1.5
_SIGMA, _SCALE = 0.8, 18  # of the prompts' lognormal lengths, tokens


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to run: adapter number 1 .. n, 0 = base model; lengths in tokens."""

    adapter: int
    prompt_tokens: int
    output_tokens: int


def adapter_counts(law: str, n: int) -> list[int]:
    """How many of n requests ask for each adapter, most popular first."""
    if law == "distinct":
        return [1] * n
    if law == "identical":
        return [n]
    if law == "uniform":
        adapters = math.isqrt(n - 1) + 1
        return [n // adapters + (i < n % adapters) for i in range(adapters)]
    if law == "skewed":
        return _skewed(n)
    raise ValueError(f"{law!r} is not one of {', '.join(LAWS)}")


def _skewed(n: int) -> list[int]:
    counts: list[int] = []
    popularity = 1.0
    while sum(counts) + int(popularity) < n:
        counts.append(int(popularity))
        popularity *= _GROWTH
    return sorted([*counts, n - sum(counts)], reverse=True)


def punica_requests(law: str, n: int, max_tokens: int) -> list[Request]:
    """n requests of at most `max_tokens` each, shuffled; lengths are the same under every law."""
    random = Random(SEED)
    lengths = [_lengths(max_tokens, random) for _ in range(n)]
    adapters = [i for i, count in enumerate(adapter_counts(law, n), 1) for _ in range(count)]
    random.shuffle(adapters)
    return [Request(adapter, *pair) for adapter, pair in zip(adapters, lengths, strict=True)]


def _lengths(max_tokens: int, random: Random) -> tuple[int, int]:
    drawn = round(random.lognormvariate(0, _SIGMA) * _SCALE - 1)
    prompt = min(max(drawn, 1), max_tokens - 2)
    total = random.randrange(max_tokens)
    return prompt, max(2, total - prompt)
