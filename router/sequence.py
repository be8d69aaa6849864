"""Sequence: one request's tokens and what it holds, from submission to its last token."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from lorafleet.cache.pages import PageLease
from lorafleet.cache.prefix import Namespace, PrefixNode
from lorafleet.proto.messages import SequenceStart
from lorafleet.router.adapter import Adapter
from lorafleet.router.request import GenerationRequest


class Status(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"  # in the waiting queue, holding neither row nor pages
    RUNNING = "running"  # has a row
    DONE = "done"  # finished, failed or aborted; holds nothing


@dataclass(eq=False, slots=True)
class Sequence:
    """Owned by the scheduler. Positions count from 0; times are of one monotonic clock."""

    ticket: int  # order of arrival, kept through preemptions
    request: GenerationRequest
    adapter: Adapter | None
    submitted_at: float
    tokens: list[int] = field(init=False)  # prompt, then generated tokens that have arrived
    num_prompt: int = field(init=False)  # tokens of the prompt
    max_tokens: int = field(init=False)  # tokens it may have in the end, prompt included
    status: Status = Status.WAITING
    started_at: float = 0.0  # first planned
    first_token_at: float = 0.0
    prompt_logprobs: list[float] = field(default_factory=list)  # of prompt token 1, 2, ...
    overtaken: int = 0  # others that started after its turn had come without a slot for it
    num_paid: int = 0  # positions at the front that its adapter's share has paid for

    # What it holds while running.
    row: int = -1
    slot: int = 0
    lease: PageLease | None = None
    num_start: int = 0  # tokens its SequenceStart carried
    num_planned: int = 0  # positions whose computation has been sent
    num_in_flight: int = 0  # samples sent and not arrived; survives a preemption
    node: PrefixNode | None = None  # where its next page is indexed, None = nowhere
    num_indexed: int = 0  # pages at the front that are in the prefix index

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_ids)
        self.num_prompt = len(self.tokens)
        self.max_tokens = self.num_prompt + self.request.max_new_tokens

    @property
    def namespace(self) -> Namespace:
        """Within it, equal tokens have equal KV."""
        return (self.adapter.info.digest if self.adapter else "", self.request.cache_salt)

    @property
    def is_running(self) -> bool:
        """Whether it has a row."""
        return self.status is Status.RUNNING

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens of its SequenceStart are left to compute."""
        return self.num_planned < self.num_start

    @property
    def can_decode(self) -> bool:
        """Whether a sampled token is there, or on its way, to compute the next one from."""
        num_sent = len(self.tokens) + self.num_in_flight
        return self.num_planned < num_sent < self.max_tokens

    def start(self) -> SequenceStart:
        """The message that puts it in its row."""
        return SequenceStart(self.row, list(self.tokens), self.num_prompt, self.request.sampling)

    def take_prompt_logprobs(self, first_position: int, values: list[float]) -> None:
        """Adds a chunk's values; those a recomputation repeats are skipped."""
        self.prompt_logprobs += values[max(0, len(self.prompt_logprobs) - first_position) :]
