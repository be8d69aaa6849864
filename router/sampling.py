"""The sampling fields both dialects share, and seeds."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

from lorafleet.proto.messages import SamplingParams
from lorafleet.router.fields import Fields

MAX_TOP_LOGPROBS = 20  # alternatives per token
_MAX_SEED = 2**64 - 1
_MAX_INT32 = 2**31 - 1
_MIN_TEMPERATURE = 1e-4  # below it dividing logits overflows: the limit is greedy
_SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so the seeds of one request's sequences differ


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a request draws. `seed` is None when greedy, else the first sequence's."""

    params: SamplingParams
    seed: int | None

    def of_sequence(self, index: int) -> SamplingParams:
        """The parameters of the request's `index`-th sequence, each with a seed of its own."""
        if self.seed is None:
            return self.params
        return replace(self.params, seed=(self.seed + index * _SEED_STRIDE) % 2**64)


def read_sampling(
    fields: Fields,
    *,
    temperature: float,
    max_temperature: float,
    top_k_off: bool,
    num_top_logprobs: int,
    prompt_logprobs: bool,
) -> Sampling:
    """Reads the fields; `temperature` is the default, 0 = greedy.

    `top_k_off`: whether 0 and -1 turn top_k off, as OpenAI-style clients write it.
    """
    temperature = fields.number("temperature", temperature, 0, max_temperature)
    params = SamplingParams(
        temperature=temperature if temperature >= _MIN_TEMPERATURE else 0.0,
        top_k=max(0, fields.integer("top_k", 0, -1 if top_k_off else 1, _MAX_INT32)),
        top_p=fields.number("top_p", 1.0, 0, 1, above_low=True),
        typical_p=fields.number("typical_p", 1.0, 0, 1, above_low=True),
        repetition_penalty=fields.number("repetition_penalty", 1.0, 0, 100, above_low=True),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2, 2),
        presence_penalty=fields.number("presence_penalty", 0.0, -2, 2),
        num_top_logprobs=num_top_logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    lowest = -(2**63) if top_k_off else 0
    seed = fields.integer("seed", None, lowest, _MAX_SEED)
    if not params.temperature:
        return Sampling(params, None)
    return Sampling(params, secrets.randbits(63) if seed is None else seed % 2**64)
