"""What a handler asks of the engine, and what it gets back token by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from lorafleet.proto.messages import AdapterKey, SamplingParams
from lorafleet.router.deadline import NEVER, Deadline


class FinishReason(Enum):
    """Why a sequence ended, in LoRAX's words."""

    LENGTH = "length"
    EOS_TOKEN = "eos_token"
    STOP_SEQUENCE = "stop_sequence"


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate; text is the handler's business, ids are the engine's."""

    prompt_ids: list[int]
    sampling: SamplingParams
    max_new_tokens: int
    adapter: AdapterKey | None = None  # None = base model
    ignore_eos: bool = False
    api_token: str = field(default="", repr=False)  # for the adapter's source
    deadline: Deadline = NEVER
    priority: int = 0  # lower is served first
    eos_token_ids: frozenset[int] | None = None  # None = the base model's
    cache_salt: str = ""  # prefixes are shared only between equal salts


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token; `finish` is set on the last one the engine will send."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (id, logprob) alternatives, best first
    finish: FinishReason | None = None
