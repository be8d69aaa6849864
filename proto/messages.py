"""The contract's messages as dataclasses; `shard.proto` documents every field.

A message here has the name and the field order of its twin in `shard.proto`. Only
`lorafleet.proto.codec` converts between the two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple


class Tier(IntEnum):
    """Where an adapter's weights are; a higher tier is closer to the compute."""

    NONE = 0
    DISK = 1
    HOST = 2
    DEVICE = 3


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What one rank serves and how much it can hold."""

    model_id: str
    architecture: str
    dtype: str
    device: str
    rank: int
    world_size: int
    vocab_size: int
    max_model_len: int
    page_size: int
    num_pages: int
    max_rows: int
    max_step_tokens: int
    num_slots: int
    arena_bytes: int
    host_bytes: int
    disk_bytes: int
    eos_token_ids: list[int]
    tokenizer_json: bytes = field(repr=False)
    tokenizer_config_json: bytes = field(repr=False)
    model_revision: str
    arena_alignment: int
    adapter_roots: list[str]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a sequence's next token is drawn; the defaults are greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    num_top_logprobs: int = 0
    prompt_logprobs: bool = False


@dataclass(frozen=True, slots=True)
class SequenceStart:
    """A sequence takes a row."""

    row: int
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class AdapterKey:
    """An adapter's identity before its content is read."""

    source: str
    id: str
    revision: str = ""

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id


class AdapterContent(NamedTuple):
    """What an adapter is for as long as its source does not change it; not a message."""

    key: AdapterKey
    digest: str  # AdapterInfo.digest


@dataclass(frozen=True, slots=True)
class AdapterMove:
    """Host to device arena, bound to a slot."""

    key: AdapterKey
    slot: int
    extent_offsets: list[int]
    extent_bytes: list[int]
    digest: str


@dataclass(slots=True)
class StepPlan:
    """One step as columns. Mutable while the scheduler fills it, constant once sent."""

    step: int
    starts: list[SequenceStart] = field(default_factory=list)
    moves: list[AdapterMove] = field(default_factory=list)
    num_prefills: int = 0
    rows: list[int] = field(default_factory=list)
    first_positions: list[int] = field(default_factory=list)
    token_counts: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    new_page_counts: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)


@dataclass(slots=True)
class StepResult:
    """What rank 0 sampled in one step."""

    step: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_ids: list[int] = field(default_factory=list)
    top_logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    ready_slots: list[int] = field(default_factory=list)
    compute_us: int = 0


@dataclass(frozen=True, slots=True)
class FetchAdapterRequest:
    """Raise an adapter to a tier. The token is a secret and stays out of `repr`."""

    key: AdapterKey
    tier: Tier
    api_token: str = field(default="", repr=False)
    refresh: bool = False
    digest: str = ""


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What a rank knows of an adapter it holds."""

    key: AdapterKey
    digest: str
    rank: int
    packed_bytes: int
    disk_bytes: int
    target_modules: list[str]
    tier: Tier
    piece_bytes: int = 0
    vocab_size: int = 0
    tokenizer_digest: str = ""
    is_public: bool = True

    @property
    def content(self) -> AdapterContent:
        """The adapter as it is now."""
        return AdapterContent(self.key, self.digest)


@dataclass(frozen=True, slots=True)
class AdapterTokenizer:
    """The tokenizer an adapter ships, as its files are."""

    digest: str
    tokenizer_json: bytes = field(repr=False)
    tokenizer_config_json: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class FetchProgress:
    """How far a fetch has come; `info` ends it."""

    stage: str
    done_bytes: int = 0
    total_bytes: int = 0
    info: AdapterInfo | None = None


@dataclass(frozen=True, slots=True)
class DropAdapterRequest:
    """Forget an adapter in a tier and above; with a digest no other content of it."""

    key: AdapterKey
    tier: Tier
    digest: str = ""
