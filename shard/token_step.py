"""TokenStep: a step of at most some hundred tokens, as captured graphs take it.

Two forms. In the first every token is a row of decode attention: all keys and values of a layer are
stored before any is read, so a prompt's tokens need no order among themselves, and each attends to
its row's pages up to its own position, as a decoded one does. In the second a prompt's tokens share
the reads of its keys, and LoRA takes runs of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from lorafleet.kernels.lora.op import MAX_DECODE_TOKENS
from lorafleet.proto.messages import StepPlan
from lorafleet.shard.flash_attention import RowPages
from lorafleet.shard.rows import RowTable

# Keys that a step's prompt tokens may read in all, each those of its row by itself.
_MAX_PROMPT_READS = 1 << 16

Segments = tuple[tuple[int, int, int], ...]  # (slot, start, stop) of runs of tokens


@dataclass(frozen=True, slots=True)
class Prompts:
    """What the second form needs besides: the step's rows, and its runs of tokens of one slot."""

    rows: RowPages
    segments: Segments


@dataclass(frozen=True, slots=True)
class TokenStep:
    """A step on the host; int64 [num_tokens] each, in the order of the plan's rows.

    locations: page * page_size + offset in the KV pool. slots: of the adapters, 0 = none.
    drawn: int64 [num_draws], the tokens whose successors are drawn. max_rank: of the slots'
    adapters; 0 where no token has one. has_prompts: whether keys older than a token's own may be
    of this step. prompts: None in the first form.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    locations: torch.Tensor
    drawn: torch.Tensor
    max_rank: int
    has_prompts: bool
    prompts: Prompts | None = None

    @classmethod
    def empty(cls, max_rank: int, prompts: Prompts | None = None) -> TokenStep:
        """A step of padding alone."""
        none = torch.empty(0, dtype=torch.int64)
        return cls(none, none, none, none, none, max_rank, False, prompts)


def token_step(plan: StepPlan, rows: RowTable, max_rank: int) -> TokenStep:
    """A plan whose pages `rows` already holds."""
    token_rows, positions, slots = per_token(plan)
    last = torch.tensor(ends(plan)) - 1
    prompts = None
    if not suits_decode(plan):
        prompts = Prompts(row_pages(plan, rows), segments_of(plan.slots, plan.token_counts))
    return TokenStep(
        token_rows, positions, slots, rows.locations(token_rows, positions),
        last[torch.tensor(plan.samples)], max_rank, plan.num_prefills > 0, prompts,
    )  # fmt: skip


def suits_decode(plan: StepPlan) -> bool:
    """Whether every token may be a row of decode attention."""
    firsts, counts = plan.first_positions, plan.token_counts[: plan.num_prefills]
    reads = sum(n * first + n * (n + 1) // 2 for first, n in zip(firsts, counts, strict=False))
    return sum(plan.token_counts) <= MAX_DECODE_TOKENS and reads <= _MAX_PROMPT_READS


def per_token(plan: StepPlan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row, position and slot of every token of a plan: int64 [num_tokens], on the host."""
    columns = torch.tensor([plan.rows, plan.first_positions, plan.token_counts, plan.slots])
    rows, firsts, counts, slots = columns
    stops = ends(plan)
    if stops[-1] == len(stops):  # one token a row
        return rows, firsts, slots
    starts = torch.tensor(stops) - counts
    offsets = torch.arange(stops[-1]) - starts.repeat_interleave(counts)
    positions = firsts.repeat_interleave(counts) + offsets
    return rows.repeat_interleave(counts), positions, slots.repeat_interleave(counts)


def ends(plan: StepPlan) -> Sequence[int]:
    """Where each row's tokens end, of all tokens of the step."""
    return list(accumulate(plan.token_counts))


def row_pages(plan: StepPlan, rows: RowTable) -> RowPages:
    """The plan's rows as attention is planned for them."""
    pairs = zip(plan.first_positions, plan.token_counts, strict=True)
    lengths = [first + count for first, count in pairs]
    pages = [rows.pages(row, length) for row, length in zip(plan.rows, lengths, strict=True)]
    return RowPages(plan.token_counts, lengths, pages)


def segments_of(slots: Sequence[int], counts: Sequence[int]) -> Segments:
    """(slot, start, stop) of each run of tokens that uses one adapter."""
    segments: list[tuple[int, int, int]] = []
    start = 0
    for slot, count in zip(slots, counts, strict=True):
        stop = start + count
        if slot and segments and segments[-1][0] == slot and segments[-1][2] == start:
            segments[-1] = (slot, segments[-1][1], stop)
        elif slot:
            segments.append((slot, start, stop))
        start = stop
    return tuple(segments)
