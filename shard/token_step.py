"""TokenStep: a step of few tokens, in which each of them is a row of decode attention.

All keys and values of a layer are stored before any is read, so a prompt's tokens need no order
among themselves: each attends to its row's pages up to its own position, as a decoded one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from lorafleet.proto.messages import StepPlan
from lorafleet.shard.rows import RowTable

# Keys that a step's prompt tokens may read in all. Each reads its row's by itself: for long rows
# an attention that shares the reads among a prompt's tokens is faster than what a graph saves.
_MAX_PROMPT_READS = 1 << 16


@dataclass(frozen=True, slots=True)
class TokenStep:
    """A step on the host; int64 [num_tokens] each, in the order of the plan's rows.

    locations: page * page_size + offset in the KV pool. slots: of the adapters, 0 = none.
    draws: bool, whether the token's successor is drawn. max_rank: of the slots' adapters; 0 where
    no token has one. has_prompts: whether keys older than a token's own may be of this step.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    locations: torch.Tensor
    draws: torch.Tensor
    max_rank: int
    has_prompts: bool

    @classmethod
    def empty(cls, max_rank: int) -> TokenStep:
        """A step of padding alone."""
        none = torch.empty(0, dtype=torch.int64)
        return cls(none, none, none, none, none.bool(), max_rank, False)


def token_step(plan: StepPlan, rows: RowTable, max_rank: int) -> TokenStep:
    """A plan whose pages `rows` already holds."""
    token_rows, positions, slots = per_token(plan)
    draws = torch.zeros(len(token_rows), dtype=torch.bool)
    draws[torch.tensor(ends(plan)) - 1] = torch.tensor(plan.samples)
    return TokenStep(
        token_rows, positions, slots, rows.locations(token_rows, positions), draws, max_rank,
        has_prompts=plan.num_prefills > 0,
    )  # fmt: skip


def reads_little(plan: StepPlan) -> bool:
    """Whether decode attention suits the plan's prompts."""
    firsts, counts = plan.first_positions, plan.token_counts[: plan.num_prefills]
    reads = sum(n * first + n * (n + 1) // 2 for first, n in zip(firsts, counts, strict=False))
    return reads <= _MAX_PROMPT_READS


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
