"""A plan as the columns of a captured step, token by token."""

from __future__ import annotations

import torch

from lorafleet.proto.messages import SamplingParams, SequenceStart, StepPlan
from lorafleet.shard.rows import RowTable
from lorafleet.shard.token_step import suits_decode, token_step


def mixed_plan() -> StepPlan:
    """A chunk of a prompt that goes on, a prompt that ends, and a decoded token."""
    return StepPlan(
        1, num_prefills=2, rows=[2, 0, 1], first_positions=[14, 0, 20], token_counts=[4, 3, 1],
        slots=[0, 5, 7], samples=[False, True, True], new_page_counts=[2, 1, 2],
        pages=[9, 4, 6, 3, 8],
    )  # fmt: skip


def test_every_token_has_its_row_place_and_slot() -> None:
    rows = RowTable(3, 64, torch.device("cpu"))
    plan = mixed_plan()
    for row in plan.rows:
        rows.begin(SequenceStart(row, [1, 2, 3], 3, SamplingParams()))
    rows.append_pages(plan)
    step = token_step(plan, rows, 8)
    assert step.rows.tolist() == [2, 2, 2, 2, 0, 0, 0, 1]
    assert step.positions.tolist() == [14, 15, 16, 17, 0, 1, 2, 20]
    assert step.slots.tolist() == [0, 0, 0, 0, 5, 5, 5, 7]
    assert step.locations.tolist() == [158, 159, 64, 65, 96, 97, 98, 8 * 16 + 4]
    assert step.drawn.tolist() == [6, 7]
    assert step.has_prompts
    assert step.max_rank == 8


def test_long_rows_are_left_to_an_attention_that_shares_its_reads() -> None:
    assert suits_decode(mixed_plan())
    chunk = StepPlan(1, num_prefills=1, rows=[0], first_positions=[0], token_counts=[256])
    assert suits_decode(chunk)
    chunk.first_positions = [1000]
    assert not suits_decode(chunk)
    chunk.num_prefills = 0  # decoded rows share nothing
    assert suits_decode(chunk)
