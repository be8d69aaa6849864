"""Batch: a step's columns as the tensors the model reads."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from lorafleet.kernels.lora.op import LoraBatch
from lorafleet.proto.messages import StepPlan
from lorafleet.shard.attention import AttentionBatch, PrefillSpan
from lorafleet.shard.config import PAGE_SIZE
from lorafleet.shard.kv_pool import KvPool
from lorafleet.shard.rows import RowTable


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's flat tensors; T tokens, S of whose rows sample.

    token_ids, positions: [T] int64. sample_tokens: [S] int64, indices into T of the last tokens of
    the sampling rows. sample_rows: those rows; sample_positions: where their new tokens will stand.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    paged: AttentionBatch
    lora: LoraBatch
    sample_tokens: torch.Tensor
    sample_rows: list[int]
    sample_positions: list[int]


def build_batch(plan: StepPlan, rows: RowTable, pool: KvPool) -> Batch:
    """Tensors of a plan whose starts and pages `rows` already holds. At least one row."""
    device = rows.device
    stops = list(accumulate(plan.token_counts))
    columns = torch.tensor([plan.rows, plan.first_positions, plan.token_counts, plan.slots])
    token_rows, positions, row_slots = _per_token(columns, stops)
    token_rows, positions = token_rows.to(device), positions.to(device)
    picked = [i for i, samples in enumerate(plan.samples) if samples]
    return Batch(
        token_ids=rows.tokens[token_rows, positions],
        positions=positions,
        paged=_attention_batch(plan, rows, pool, token_rows, positions, stops),
        lora=LoraBatch(row_slots.to(device), _segments(plan.slots, plan.token_counts)),
        sample_tokens=torch.tensor([stops[i] - 1 for i in picked], dtype=torch.int64).to(device),
        sample_rows=[plan.rows[i] for i in picked],
        sample_positions=[plan.first_positions[i] + plan.token_counts[i] for i in picked],
    )


def _per_token(
    columns: torch.Tensor, stops: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row, position and slot (int32) of every token, from [4, num_rows] row columns."""
    rows, firsts, counts, slots = columns
    if stops[-1] == len(stops):  # one token a row
        return rows, firsts, slots.int()
    starts = torch.tensor(stops) - counts
    offsets = torch.arange(stops[-1]) - starts.repeat_interleave(counts)
    positions = firsts.repeat_interleave(counts) + offsets
    return rows.repeat_interleave(counts), positions, slots.repeat_interleave(counts).int()


def _attention_batch(
    plan: StepPlan,
    rows: RowTable,
    pool: KvPool,
    token_rows: torch.Tensor,
    positions: torch.Tensor,
    stops: list[int],
) -> AttentionBatch:
    pages = rows.page_table[token_rows, positions // PAGE_SIZE]
    spans = []
    for i in range(plan.num_prefills):
        first, count = plan.first_positions[i], plan.token_counts[i]
        held = rows.page_table[plan.rows[i], : rows.pages_for(first + count)]
        spans.append(PrefillSpan(stops[i] - count, stops[i], first, held))
    decode_start = stops[plan.num_prefills - 1] if plan.num_prefills else 0
    longest = max(plan.first_positions[plan.num_prefills :], default=0) + 1
    return AttentionBatch(
        pool=pool,
        locations=pages * PAGE_SIZE + positions % PAGE_SIZE,
        spans=spans,
        decode_start=decode_start,
        decode_pages=rows.page_table[token_rows[decode_start:], : rows.pages_for(longest)],
        decode_lengths=positions[decode_start:] + 1,
    )


def _segments(slots: list[int], counts: list[int]) -> tuple[tuple[int, int, int], ...]:
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
