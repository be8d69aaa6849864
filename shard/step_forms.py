"""The two forms of a captured step: what its attention and its LoRA read. See token_step.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from lorafleet.kernels.decode_attention.op import decode_attention
from lorafleet.kernels.linear.cuda import is_hopper
from lorafleet.kernels.lora.cuda import TILE_TOKENS
from lorafleet.kernels.lora.op import MAX_DECODE_TOKENS, LoraBatch
from lorafleet.shard.attention import AttentionKind, PagedBatch
from lorafleet.shard.flash_attention import CapturedFlash
from lorafleet.shard.kv_pool import KvPool
from lorafleet.shard.lora_class import (
    LoraClass,
    any_class,
    any_classes,
    decode_class,
    decode_classes,
)
from lorafleet.shard.rows import RowTable
from lorafleet.shard.step_inputs import StepInputs
from lorafleet.shard.token_step import Prompts, TokenStep

_PROMPT_SIZES = (128, 256, 384, 512, 640, 768, 896, 1024)


class StepForm(Protocol):
    """How steps of some sizes are captured."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Token counts, ascending."""

    def inputs(self, size: int) -> StepInputs:
        """New buffers."""

    def padding(self, size: int, max_rank: int) -> TokenStep:
        """A step without rows, to be captured."""

    def prepare(self, step: TokenStep) -> None:
        """What must be done on the host before a step's graph is replayed."""

    def paged(self, inputs: StepInputs) -> PagedBatch:
        """The attention of the captured step."""

    def lora_classes(self, size: int) -> list[LoraClass]:
        """All that steps of a size can be of, of usual ranks."""

    def lora_class(self, step: TokenStep, size: int) -> LoraClass:
        """A step's, padded to `size` tokens."""

    def lora(self, inputs: StepInputs, lora: LoraClass) -> LoraBatch:
        """The LoRA of the captured step."""


@dataclass(frozen=True, slots=True)
class _DecodeBatch:
    """Decode attention at fixed addresses, as the layers read it."""

    pool: KvPool
    inputs: StepInputs
    page_table: torch.Tensor
    arrived: torch.Tensor

    @property
    def locations(self) -> torch.Tensor:
        return self.inputs.columns.locations

    def attend(self, layer: int, query: torch.Tensor, kind: AttentionKind) -> torch.Tensor:
        columns = self.inputs.columns
        return decode_attention(
            query.contiguous(), self.pool.keys[layer], self.pool.values[layer], self.page_table,
            columns.rows, columns.positions, columns.fresh, self.arrived, *kind,
        )  # fmt: skip


class DecodeForm:
    """Every token a row of decode attention."""

    def __init__(
        self, rows: RowTable, pool: KvPool, arrived: torch.Tensor, max_tokens: int
    ) -> None:
        """`arrived`: as decode_attention takes it, for the largest size."""
        self._rows, self._kv, self._arrived = rows, pool, arrived
        self.sizes = token_counts(min(max_tokens, MAX_DECODE_TOKENS))
        self._counts_slots = is_hopper(rows.device)  # few slots' updates have a kernel there

    def inputs(self, size: int) -> StepInputs:
        """New buffers."""
        return StepInputs(size, min(size, self._rows.max_rows), 0, self._rows.device)

    def padding(self, size: int, max_rank: int) -> TokenStep:
        """A step without rows."""
        return TokenStep.empty(max_rank)

    def prepare(self, step: TokenStep) -> None:
        """Nothing: all is in the buffers."""

    def paged(self, inputs: StepInputs) -> PagedBatch:
        """Attention row by row."""
        return _DecodeBatch(self._kv, inputs, self._rows.page_table, self._arrived)

    def lora_classes(self, size: int) -> list[LoraClass]:
        """Few slots, where that matters and there can be few, and any."""
        return decode_classes(size) if self._counts_slots else any_classes()

    def lora_class(self, step: TokenStep, size: int) -> LoraClass:
        """By its ranks, and slots."""
        if not self._counts_slots:
            return any_class(step.max_rank)
        return decode_class(step.slots.tolist(), size, step.max_rank)

    def lora(self, inputs: StepInputs, lora: LoraClass) -> LoraBatch:
        """One token a row."""
        return LoraBatch.captured(inputs.columns.slots, lora.max_rank, is_few=lora.is_few)


class PromptForm:
    """Prompts' tokens share the reads of their keys; LoRA takes tiles."""

    def __init__(self, rows: RowTable, flash: CapturedFlash, max_tokens: int) -> None:
        self._rows, self._flash = rows, flash
        self.sizes = tuple(size for size in _PROMPT_SIZES if size <= max_tokens)

    def fits(self, prompts: Prompts, num_tokens: int) -> bool:
        """Whether there is a graph for the step."""
        return num_tokens <= self.sizes[-1] and len(prompts.rows.lengths) <= self._flash.max_rows

    def inputs(self, size: int) -> StepInputs:
        """New buffers."""
        draws = min(size, self._flash.max_rows)
        # Each row's run of tokens ends in a tile that may not be full, and so may the padding.
        tiles = size // TILE_TOKENS + self._flash.max_rows + 1
        return StepInputs(size, draws, tiles, self._rows.device)

    def padding(self, size: int, max_rank: int) -> TokenStep:
        """A step without rows; attention, while captured, wants a plan for every token."""
        return TokenStep.empty(max_rank, Prompts(self._flash.scratch_rows(size), ()))

    def prepare(self, step: TokenStep) -> None:
        """Plans the attention."""
        assert step.prompts is not None
        self._flash.plan(step.prompts.rows)

    def paged(self, inputs: StepInputs) -> PagedBatch:
        """Attention as planned."""
        return self._flash.batch(inputs.columns.locations)

    def lora_classes(self, size: int) -> list[LoraClass]:
        """Any slots."""
        return any_classes()

    def lora_class(self, step: TokenStep, size: int) -> LoraClass:
        """By its ranks alone."""
        return any_class(step.max_rank)

    def lora(self, inputs: StepInputs, lora: LoraClass) -> LoraBatch:
        """Tiles of one slot's tokens."""
        return LoraBatch.captured(inputs.columns.slots, lora.max_rank, inputs.columns.tiles)


def token_counts(largest: int) -> tuple[int, ...]:
    """The decode form's sizes: dense where a token more costs most, then in steps of 8, 16, 32."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, largest + 1, 32)]
    return tuple(n for n in sizes if n <= largest)
