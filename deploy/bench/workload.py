"""What is asked and when: popularity of adapters, lengths, arrivals. Pure and seeded.

Popularity laws, for n adapters, of the adapter with index i (1 .. n):

- distinct: request j asks for adapter 1 + j mod n, so up to n requests side by side share none.
- uniform: ceil(sqrt(n)) adapters with equal probability.
- zipf:S: p_i = i^-S / sum_k k^-S.
- identical: every request asks for adapter 1.

distinct, uniform and identical are those of Punica (Chen et al., MLSys 2024, section 7), which
takes n = the number of requests; here n is the number of adapters. Its "skewed" is geometric
(each adapter 1.5 times as popular as the next); zipf:S is Zipf's law as in the S-LoRA follow-ups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


@dataclass(frozen=True, slots=True)
class Length:
    """A number of tokens, uniform over low .. high."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Length:
        """`128`, or `64,192`. Raises ValueError."""
        parts = [int(part) for part in text.split(",")]
        if len(parts) > 2 or parts[0] < 1 or parts[-1] < parts[0]:
            raise ValueError(f"{text!r} is not a length such as 128 or a range such as 64,192")
        return cls(parts[0], parts[-1])

    def draw(self, random: Random) -> int:
        """One length."""
        return random.randint(self.low, self.high)

    def __str__(self) -> str:
        return f"{self.low}" if self.low == self.high else f"{self.low},{self.high}"


@dataclass(frozen=True, slots=True)
class Popularity:
    """How requests spread over adapters; `exponent` is Zipf's S."""

    law: str
    exponent: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Popularity:
        """`distinct`, `uniform`, `identical` or `zipf:S`. Raises ValueError."""
        law, _, exponent = text.partition(":")
        if law == "zipf" and exponent:
            return cls(law, float(exponent))
        if law in ("distinct", "uniform", "identical") and not exponent:
            return cls(law)
        raise ValueError(f"{text!r} is not distinct, uniform, identical or zipf:S")

    def draw(self, adapters: Sequence[str], count: int, random: Random) -> list[str]:
        """The adapters of `count` requests, in order."""
        if self.law == "distinct":
            return [adapters[j % len(adapters)] for j in range(count)]
        weights = self.weights(len(adapters))
        return random.choices(adapters[: len(weights)], weights, k=count)

    def weights(self, n: int) -> list[float]:
        """Relative popularity of the adapters that are asked for, most popular first."""
        if self.law == "identical":
            return [1.0]
        if self.law == "zipf":
            return [i**-self.exponent for i in range(1, n + 1)]
        return [1.0] * (math.isqrt(n - 1) + 1 if self.law == "uniform" else n)

    def __str__(self) -> str:
        return f"{self.law}:{self.exponent:g}" if self.law == "zipf" else self.law


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to send; `at` is seconds after the start, 0 in a closed loop."""

    adapter: str
    prompt: str | list[int]  # text, or token ids where the server takes them
    output_tokens: int
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Workload:
    """Everything that decides the requests of a run."""

    adapters: tuple[str, ...]
    popularity: Popularity
    num_requests: int
    prompt_tokens: Length
    output_tokens: Length
    rate: float = 0.0  # requests per second, Poisson; 0 = closed loop
    seed: int = 0

    def asks(self, tokens_per_word: float) -> list[Ask]:
        """The requests in order of arrival; prompts are random words of about the right length."""
        random = Random(self.seed)
        chosen = self.popularity.draw(self.adapters, self.num_requests, random)
        arrivals = poisson(self.rate, self.num_requests, random)
        return [
            Ask(
                adapter,
                words(round(self.prompt_tokens.draw(random) / tokens_per_word), random),
                self.output_tokens.draw(random),
                at,
            )
            for adapter, at in zip(chosen, arrivals, strict=True)
        ]


def poisson(rate: float, count: int, random: Random) -> list[float]:
    """Arrival times of a Poisson process of `rate` per second; all zero without a rate."""
    if not rate:
        return [0.0] * count
    now, times = 0.0, []
    for _ in range(count):
        now += random.expovariate(rate)
        times.append(now)
    return times


def words(count: int, random: Random) -> str:
    """A text of `count` random words of two syllables, at least one."""
    return " ".join("".join(random.choices(_SYLLABLES, k=2)) for _ in range(max(1, count)))
