"""Sampling: the filters are transformers' filters, and a draw depends on its own row only."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from lorafleet.proto.messages import SamplingParams
from lorafleet.shard import sampling
from lorafleet.shard.sampling import Draw, sample, top_logprobs, uniform

VOCAB = 50
PROMPT = 6
LENGTH = 10

VARIED = [
    SamplingParams(),
    SamplingParams(temperature=0.7, seed=1),
    SamplingParams(temperature=1.3, top_k=5, seed=2),
    SamplingParams(temperature=1.0, top_p=0.6, seed=3),
    SamplingParams(temperature=0.9, typical_p=0.5, seed=4),
    SamplingParams(temperature=1.1, top_k=20, top_p=0.8, typical_p=0.9, seed=5),
    SamplingParams(repetition_penalty=1.8),
    SamplingParams(temperature=1.0, frequency_penalty=1.5, presence_penalty=-0.5, seed=6),
]


def history(num_rows: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (num_rows, LENGTH), generator=torch.Generator().manual_seed(3))


def logits(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(4)) * 2


def draw(
    scores: torch.Tensor,
    params: list[SamplingParams],
    tokens: torch.Tensor,
    positions: list[int] | None = None,
) -> Draw:
    places = positions or [LENGTH] * len(params)
    prompts = [PROMPT] * len(params)
    return sample(scores, params, places, prompts, lambda rows, n: tokens[rows, :n])


def expected_distribution(
    scores: torch.Tensor, params: SamplingParams, tokens: torch.Tensor
) -> torch.Tensor:
    """Probabilities [vocab] by transformers' processors; frequency and presence by definition."""
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    ids = cast(torch.LongTensor, tokens.unsqueeze(0))
    scores = processors(ids, scores.unsqueeze(0))
    counts = torch.bincount(tokens[PROMPT:], minlength=VOCAB)
    scores = scores - counts * params.frequency_penalty - (counts > 0) * params.presence_penalty
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.typical_p < 1:
        warpers.append(TypicalLogitsWarper(params.typical_p))
    return warpers(ids, scores).softmax(-1)[0]


@pytest.mark.parametrize("params", [p for p in VARIED if p.temperature > 0], ids=str)
def test_draws_follow_transformers_distribution(params: SamplingParams) -> None:
    num_draws = 20_000
    one, tokens = logits(1), history(1)
    batch = [replace(params, seed=seed) for seed in range(num_draws)]
    drawn = draw(one.expand(num_draws, -1), batch, tokens.expand(num_draws, -1)).tokens
    found = torch.bincount(drawn, minlength=VOCAB) / num_draws
    expected = expected_distribution(one[0], params, tokens[0])
    assert set(drawn.tolist()) <= set(expected.nonzero().flatten().tolist())
    # Three standard deviations of a binomial count, and a floor for rare tokens.
    allowed = 3.5 * (expected * (1 - expected) / num_draws).sqrt() + 1e-3
    assert ((found - expected).abs() <= allowed).all()


def test_repetition_penalty_changes_the_greedy_choice_as_in_transformers() -> None:
    scores, tokens = logits(4), history(4)
    tokens[:, 0] = scores.argmax(-1)  # the favourite was said before
    params = [SamplingParams(repetition_penalty=5.0)] * 4
    processor = RepetitionPenaltyLogitsProcessor(5.0)
    expected = processor(tokens, scores.clone()).argmax(-1)
    assert draw(scores, params, tokens).tokens.tolist() == expected.tolist()
    assert not torch.equal(expected, scores.argmax(-1))


def test_tokens_that_a_row_has_not_change_nothing_and_are_never_drawn() -> None:
    """A batch's logits are as wide as its widest vocabulary; the others' columns are -inf."""
    params = [replace(p, seed=seed) for p in VARIED for seed in range(200)]
    scores, tokens = logits(len(VARIED)), history(len(VARIED))
    scores = scores.repeat_interleave(200, dim=0)
    tokens = tokens.repeat_interleave(200, dim=0)
    wide = torch.cat([scores, torch.full((len(scores), 30), -torch.inf)], dim=1)
    narrow, widened = draw(scores, params, tokens), draw(wide, params, tokens)
    assert torch.equal(narrow.tokens, widened.tokens)
    torch.testing.assert_close(narrow.logprobs, widened.logprobs)


def test_a_prompts_token_that_the_head_has_not_may_be_penalized() -> None:
    wide = torch.cat([logits(1), torch.full((1, 30), -torch.inf)], dim=1)
    tokens = history(1)
    tokens[0, 0] = VOCAB + 29
    drawn = draw(wide, [SamplingParams(repetition_penalty=1.5, temperature=1.0)], tokens)
    assert drawn.tokens.item() < VOCAB


def test_the_largest_uniform_number_draws_a_token_of_the_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampling, "uniform", lambda seed, position: 1 - 2.0**-53)
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(64)]
    scores = logits(64)
    wide = torch.cat([scores, torch.full((64, 30), -torch.inf)], dim=1)
    assert draw(wide, params, history(64)).tokens.max() < VOCAB


def test_a_draw_is_the_same_whatever_shares_its_batch() -> None:
    scores, tokens = logits(len(VARIED)), history(len(VARIED))
    together = draw(scores, VARIED, tokens)
    for row, params in enumerate(VARIED):
        alone = draw(scores[row : row + 1], [params], tokens[row : row + 1])
        assert alone.tokens[0] == together.tokens[row]
        assert torch.isclose(alone.logprobs[0], together.logprobs[row])


def test_history_past_a_rows_end_is_not_its_own() -> None:
    scores, tokens = logits(2), history(2)
    params = [SamplingParams(repetition_penalty=3.0, presence_penalty=1.0)] * 2
    short = draw(scores, params, tokens, positions=[PROMPT + 1, LENGTH])
    other = tokens.clone()
    other[0, PROMPT + 1 :] = scores[0].argmax()  # another sequence's leftovers
    assert torch.equal(short.tokens, draw(scores, params, other, [PROMPT + 1, LENGTH]).tokens)


def test_logprobs_are_of_the_models_own_distribution() -> None:
    scores, tokens = logits(1), history(1)
    drawn = draw(scores, [SamplingParams(temperature=0.3, top_k=2, seed=9)], tokens)
    assert torch.isclose(drawn.logprobs[0], scores.log_softmax(-1)[0, drawn.tokens[0]])
    ids, values = top_logprobs(scores, 3)
    assert ids[0].tolist() == scores[0].topk(3).indices.tolist()
    assert torch.allclose(values[0], scores.log_softmax(-1)[0, ids[0]])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_fails_alone(bad: float) -> None:
    scores, tokens = logits(3), history(3)
    scores[1, 7] = bad
    params = [SamplingParams(temperature=1.0, seed=s) for s in range(3)]
    found = draw(scores, params, tokens).tokens
    assert found[1] == -1
    clean = draw(logits(3), params, tokens).tokens
    assert found[[0, 2]].tolist() == clean[[0, 2]].tolist()


def test_uniforms_are_uniform_and_independent_of_each_other() -> None:
    draws = torch.tensor([[uniform(seed, place) for place in range(200)] for seed in range(200)])
    assert ((draws >= 0) & (draws < 1)).all()
    assert abs(draws.mean() - 0.5) < 0.005
    assert torch.histc(draws, 20, 0, 1).std() < 0.05 * draws.numel() / 20
    correlation = torch.corrcoef(torch.stack([draws[:, :-1].flatten(), draws[:, 1:].flatten()]))
    assert abs(correlation[0, 1]) < 0.02
