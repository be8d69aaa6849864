"""Logits -> tokens: the same draw on every rank, on every device, whatever shares the batch.

A draw depends on its row's logits and on (seed, position) only: one uniform number, from a
counter-based generator, is looked up in the cumulative distribution. Filters follow the order and
the definitions of transformers' logits processors: penalties, temperature, top-k, top-p, typical.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lorafleet.proto.messages import SamplingParams
from lorafleet.shard.transfers import to_device

# OpenAI's number for what cannot be: a finite one, as JSON has no others.
LOWEST_LOGPROB = -9999.0

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Draw:
    """What S rows sampled: tokens [S] int64 (-1 where logits were not finite), logprobs [S]."""

    tokens: torch.Tensor
    logprobs: torch.Tensor


def sample(
    logits: torch.Tensor,
    params: list[SamplingParams],
    positions: list[int],
    num_prompt_tokens: list[int],
    history: Callable[[list[int], int], torch.Tensor],
) -> Draw:
    """Draws one token per row.

    logits: [S, vocab] float32. positions: where the new tokens will stand, that is, how many
    tokens each row has. `history(indices, length)` gives the first `length` tokens of those of the
    S rows, [len(indices), length] int64.
    """
    scores = _penalize(logits, params, positions, num_prompt_tokens, history)
    tokens = scores.argmax(dim=-1)
    drawn = [i for i, p in enumerate(params) if p.temperature > 0]
    if drawn:
        index = to_device(torch.tensor(drawn), logits.device)
        uniforms = [uniform(params[i].seed, positions[i]) for i in drawn]
        picked = _draw(scores[index], [params[i] for i in drawn], uniforms)
        tokens = tokens.index_copy(0, index, picked)
    return _draw_of(logits, tokens)


def greedy(logits: torch.Tensor) -> Draw:
    """The likeliest token of every row of [S, vocab] float32 logits."""
    return _draw_of(logits, logits.argmax(dim=-1))


def is_greedy(params: SamplingParams) -> bool:
    """Whether `greedy` draws what `sample` would."""
    return not (params.temperature > 0 or _has_penalty(params))


def top_logprobs(logits: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and log-probabilities of the `num` likeliest tokens, best first: two [S, num]."""
    values, ids = logits.topk(num, dim=-1)
    logprobs = values - torch.logsumexp(logits, dim=-1, keepdim=True)
    return ids, logprobs.clamp_(min=LOWEST_LOGPROB)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for draw `position` of a sequence; splitmix64 of both (Steele 2014)."""
    mixed = _splitmix64(_splitmix64(seed & _MASK64) ^ position)
    return (mixed >> 11) * 2.0**-53


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _draw_of(logits: torch.Tensor, tokens: torch.Tensor) -> Draw:
    normalizer = torch.logsumexp(logits, dim=-1)
    logprobs = logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - normalizer
    return Draw(torch.where(torch.isfinite(normalizer), tokens, -1), logprobs)


def _penalize(
    logits: torch.Tensor,
    params: list[SamplingParams],
    positions: list[int],
    num_prompt_tokens: list[int],
    history: Callable[[list[int], int], torch.Tensor],
) -> torch.Tensor:
    """Repetition penalty over all tokens so far; frequency and presence over generated ones."""
    rows = [i for i, p in enumerate(params) if _has_penalty(p)]
    if not rows:
        return logits
    device = logits.device
    lengths = to_device(torch.tensor([positions[i] for i in rows]), device).unsqueeze(1)
    asked = torch.tensor([num_prompt_tokens[i] for i in rows])
    prompts = to_device(asked, device).unsqueeze(1)
    seen = history(rows, max(positions[i] for i in rows))
    place = torch.arange(seen.shape[1], device=device).unsqueeze(0)
    # Past a row's end stands its first token: it is in the history anyway.
    seen = torch.where(place < lengths, seen, seen[:, :1])
    generated = ((place >= prompts) & (place < lengths)).float()
    index = to_device(torch.tensor(rows), device)
    scores = _penalize_rows(logits[index], seen, generated, [params[i] for i in rows])
    return logits.index_copy(0, index, scores)


def _penalize_rows(
    scores: torch.Tensor, seen: torch.Tensor, generated: torch.Tensor, params: list[SamplingParams]
) -> torch.Tensor:
    repetition = _column(scores, [p.repetition_penalty for p in params])
    found = scores.gather(1, seen)
    scores = scores.scatter(1, seen, torch.where(found < 0, found * repetition, found / repetition))
    counts = torch.zeros_like(scores).scatter_add_(1, seen, generated)
    frequency = _column(scores, [p.frequency_penalty for p in params])
    presence = _column(scores, [p.presence_penalty for p in params])
    return scores - counts * frequency - (counts > 0) * presence


def _draw(
    scores: torch.Tensor, params: list[SamplingParams], uniforms: list[float]
) -> torch.Tensor:
    """One token per row of [n, vocab] scores: the inverse of the cumulative distribution."""
    scores = scores / _column(scores, [p.temperature for p in params])
    if any(p.top_k for p in params):
        scores = _keep_top_k(scores, [p.top_k for p in params])
    if any(p.top_p < 1 for p in params):
        scores = _keep_top_p(scores, _column(scores, [p.top_p for p in params]))
    if any(p.typical_p < 1 for p in params):
        scores = _keep_typical(scores, _column(scores, [p.typical_p for p in params]))
    cumulative = torch.softmax(scores, dim=-1, dtype=torch.float64).cumsum(dim=-1)
    point = to_device(torch.tensor(uniforms, dtype=torch.float64), scores.device).unsqueeze(1)
    picked = torch.searchsorted(cumulative, point * cumulative[:, -1:], right=True).squeeze(1)
    return picked.clamp_(max=scores.shape[1] - 1)


def _keep_top_k(scores: torch.Tensor, top_k: list[int]) -> torch.Tensor:
    vocab = scores.shape[1]
    ks = [min(k or vocab, vocab) for k in top_k]
    best = scores.topk(max(ks), dim=-1).values
    last = best.gather(1, to_device(torch.tensor(ks), scores.device).unsqueeze(1) - 1)
    return scores.masked_fill(scores < last, float("-inf"))


def _keep_top_p(scores: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keeps the smallest set of likeliest tokens whose probabilities sum to top_p or more."""
    ordered, order = scores.sort(dim=-1)
    drop = (ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p) & (top_p < 1)
    drop[:, -1] = False
    return scores.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), float("-inf"))


def _keep_typical(scores: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Keeps tokens whose surprise is nearest the entropy, up to `mass` (Meister et al. 2022)."""
    logp = scores.log_softmax(dim=-1)
    p = logp.exp()
    entropy = -(logp * p).nansum(dim=-1, keepdim=True)
    distance, order = (-logp - entropy).abs().sort(dim=-1)
    cumulative = scores.gather(1, order).softmax(dim=-1).cumsum(dim=-1)
    last = (cumulative < mass).sum(dim=-1, keepdim=True).clamp_(max=scores.shape[1] - 1)
    drop = (distance > distance.gather(1, last)) & (mass < 1)
    return scores.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), float("-inf"))


def _has_penalty(p: SamplingParams) -> bool:
    return p.repetition_penalty != 1 or p.frequency_penalty != 0 or p.presence_penalty != 0


def _column(like: torch.Tensor, values: list[float]) -> torch.Tensor:
    return to_device(torch.tensor(values, dtype=like.dtype), like.device).unsqueeze(1)
