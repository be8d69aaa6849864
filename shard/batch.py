"""Batch: a step's columns as the tensors the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorafleet.kernels.lora.op import LoraBatch
from lorafleet.proto.messages import StepPlan
from lorafleet.shard.attention import AttentionBatch, PagedBatch, PrefillSpan
from lorafleet.shard.config import PAGE_SIZE
from lorafleet.shard.flash_attention import FlashAttention
from lorafleet.shard.kv_pool import KvPool
from lorafleet.shard.last_tokens import LastTokens
from lorafleet.shard.rows import RowTable
from lorafleet.shard.token_step import ends, per_token, row_pages, segments_of
from lorafleet.shard.transfers import to_device


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's flat tensors; T tokens, S of whose rows sample.

    token_ids, positions: [T] int64. sample_tokens: [S] int64, indices into T of the last tokens of
    the sampling rows. sample_rows: those rows; sample_positions: where their new tokens will stand;
    sample_segments: (slot, start, stop) of their runs that use one adapter.
    spans: the prefill rows.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    paged: PagedBatch
    spans: list[PrefillSpan]
    lora: LoraBatch
    sample_tokens: torch.Tensor
    sample_rows: list[int]
    sample_positions: list[int]
    sample_segments: tuple[tuple[int, int, int], ...]

    def last_tokens(self) -> LastTokens | None:
        """The sampling rows' tokens; None where every token is one, each in its place."""
        if len(self.sample_tokens) == len(self.token_ids):
            return None
        slots = self.lora.row_slots
        if not self.lora.is_empty:
            slots = slots[self.sample_tokens]
        lora = LoraBatch(slots, self.sample_segments, self.lora.max_rank)
        return LastTokens(self.sample_tokens, lora)


def build_batch(
    plan: StepPlan,
    rows: RowTable,
    pool: KvPool,
    max_rank: int,
    flash: FlashAttention | None = None,
) -> Batch:
    """Tensors of a plan whose starts and pages `rows` already holds. At least one row.

    `max_rank` is the largest of the slots' adapters. Attention is planned with `flash` where there
    is one, and is plain torch otherwise.
    """
    device = rows.device
    stops = ends(plan)
    token_rows, positions, row_slots = per_token(plan)
    token_rows, positions = to_device(token_rows, device), to_device(positions, device)
    spans = _spans(plan, rows, stops)
    picked = [i for i, samples in enumerate(plan.samples) if samples]
    return Batch(
        token_ids=rows.tokens[token_rows, positions],
        positions=positions,
        paged=_paged_batch(plan, rows, pool, flash, spans, token_rows, positions),
        spans=spans,
        lora=LoraBatch(
            to_device(row_slots.int(), device), segments_of(plan.slots, plan.token_counts), max_rank
        ),
        sample_tokens=to_device(
            torch.tensor([stops[i] - 1 for i in picked], dtype=torch.int64), device
        ),
        sample_rows=[plan.rows[i] for i in picked],
        sample_positions=[plan.first_positions[i] + plan.token_counts[i] for i in picked],
        sample_segments=segments_of([plan.slots[i] for i in picked], [1] * len(picked)),
    )


def _spans(plan: StepPlan, rows: RowTable, stops: Sequence[int]) -> list[PrefillSpan]:
    spans = []
    for i in range(plan.num_prefills):
        first, count = plan.first_positions[i], plan.token_counts[i]
        held = rows.page_table[plan.rows[i], : rows.pages_for(first + count)]
        spans.append(PrefillSpan(stops[i] - count, stops[i], first, held))
    return spans


def _paged_batch(
    plan: StepPlan,
    rows: RowTable,
    pool: KvPool,
    flash: FlashAttention | None,
    spans: list[PrefillSpan],
    token_rows: torch.Tensor,
    positions: torch.Tensor,
) -> PagedBatch:
    pages = rows.page_table[token_rows, positions // PAGE_SIZE]
    locations = pages * PAGE_SIZE + positions % PAGE_SIZE
    if flash is not None:
        return flash.mixed(locations, row_pages(plan, rows))
    decode_start = spans[-1].stop if spans else 0
    longest = max(plan.first_positions[plan.num_prefills :], default=0) + 1
    return AttentionBatch(
        pool=pool,
        locations=locations,
        spans=spans,
        decode_start=decode_start,
        decode_pages=rows.page_table[token_rows[decode_start:], : rows.pages_for(longest)],
        decode_lengths=positions[decode_start:] + 1,
    )
