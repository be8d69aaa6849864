"""DecodeGraphs: decode steps as captured CUDA graphs, one per batch size and LoRA class.

A graph holds everything from the input tokens to the greedy choice. What changes between steps is
read from fixed buffers, filled by one copy from page-locked memory before each replay; rows beyond
the step's own are padding, which reads and writes a scratch row and a scratch page only.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorafleet.kernels.decode_attention.op import decode_attention, supports
from lorafleet.kernels.greedy.op import greedy as greedy_kernel
from lorafleet.kernels.lora.op import LoraBatch
from lorafleet.shard.attention import AttentionKind
from lorafleet.shard.config import PAGE_SIZE
from lorafleet.shard.kv_pool import KvPool
from lorafleet.shard.model import Decoder
from lorafleet.shard.rows import RowTable
from lorafleet.shard.sampling import Draw, greedy

log = logging.getLogger(__name__)

# Largest rank of an adapter in the step: the grids of the LoRA kernels are captured for it.
RANK_CLASSES = (16, 64, 512)
_NO_LORA = 0
_MAX_CAPTURED_ROWS = 256


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """A decode-only step on the host; one entry a row, one token each."""

    rows: Sequence[int]
    positions: Sequence[int]
    slots: Sequence[int]
    locations: Sequence[int]  # page * page_size + offset of the new tokens
    max_rank: int  # of the slots' adapters; 0 where no row has one


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor
    draw: Draw


class _Inputs:
    """The buffers that one batch size's graphs read, and what fills them."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._staging = torch.zeros(6, size, dtype=torch.int64, pin_memory=True)
        self._columns = torch.zeros(6, size, dtype=torch.int64, device=device)
        # Input and next token in the flat token table, then row, position and location; int64.
        self.source, self.target, self.rows, self.positions, self.locations, _ = self._columns
        self.slots = self._columns[5].view(torch.int32)[:size]

    def fill(self, step: DecodeStep, row_width: int, scratch_row: int, scratch_page: int) -> None:
        """Queues the copy of a step's columns; the staging memory must be free again."""
        count = len(step.rows)
        source, target, rows, positions, locations, slots = self._staging
        rows.fill_(scratch_row)
        positions.zero_()
        locations.fill_(scratch_page * PAGE_SIZE)
        slots.zero_()
        if count:
            rows[:count] = torch.tensor(step.rows)
            positions[:count] = torch.tensor(step.positions)
            locations[:count] = torch.tensor(step.locations)
            slots.view(torch.int32)[:count] = torch.tensor(step.slots, dtype=torch.int32)
        torch.add(positions, rows, alpha=row_width, out=source)
        torch.add(source, 1, out=target)
        self._columns.copy_(self._staging, non_blocking=True)


@dataclass(frozen=True, slots=True)
class CapturedBatch:
    """A decode step's attention at fixed addresses, as the layers read it."""

    pool: KvPool
    locations: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    page_table: torch.Tensor
    arrived: torch.Tensor

    def attend(self, layer: int, query: torch.Tensor, kind: AttentionKind) -> torch.Tensor:
        """Attention [num_rows, heads, head_dim] of one token a row."""
        return decode_attention(
            query.contiguous(), self.pool.keys[layer], self.pool.values[layer], self.page_table,
            self.rows, self.positions, self.arrived, *kind,
        )  # fmt: skip


class DecodeGraphs:
    """Captures and replays. Belongs to the compute thread."""

    def __init__(self, decoder: Decoder, rows: RowTable, pool: KvPool) -> None:
        """Captures nothing yet."""
        self._decoder, self._rows, self._kv = decoder, rows, pool
        self._sizes = [n for n in batch_sizes(_MAX_CAPTURED_ROWS) if n < 2 * rows.max_rows]
        self._pool = torch.cuda.graph_pool_handle()
        self._inputs: dict[int, _Inputs] = {}
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._filled = torch.cuda.Event()
        units = self._sizes[-1] * decoder.partition.local_kv_heads
        self._arrived = torch.zeros(units, dtype=torch.int32, device=rows.device)
        rows.page_table[rows.max_rows] = pool.scratch_page

    @staticmethod
    def supports(decoder: Decoder) -> bool:
        """Whether the decoder's steps can be captured."""
        part = decoder.partition
        if decoder.device.type != "cuda" or decoder.has_experts:
            return False
        return supports(decoder.dtype, part.local_heads, part.local_kv_heads, part.head_dim)

    def capture_all(self) -> None:
        """Captures every batch size, without adapters and with those of the usual ranks.

        The largest goes first, so that the others fit into its memory.
        """
        keys = [(n, rank) for n in reversed(self._sizes) for rank in (_NO_LORA, *RANK_CLASSES[:2])]
        started = time.perf_counter()
        for size, rank in keys:
            self._graph(size, rank)
        log.info("captured %d graphs in %.1f s", len(keys), time.perf_counter() - started)

    def fits(self, num_rows: int) -> bool:
        """Whether a step of this many rows can be replayed."""
        return num_rows <= self._sizes[-1]

    @torch.inference_mode()
    def run(self, step: DecodeStep) -> tuple[torch.Tensor, Draw]:
        """Queues a step: what the head gives [rows, vocab], and the greedy choice.

        Both are valid until the next call; the greedy tokens are already in the row table.
        """
        count = len(step.rows)
        size = self._sizes[bisect_left(self._sizes, count)]
        captured = self._graph(size, rank_class(step.max_rank))
        self._prepare(size, step)
        captured.graph.replay()
        draw = Draw(captured.draw.tokens[:count], captured.draw.logprobs[:count])
        return captured.logits[:count], draw

    def replay(self, num_rows: int, max_rank: int) -> None:
        """Queues the graph of such a step once more over its last inputs, to be timed."""
        size = self._sizes[bisect_left(self._sizes, num_rows)]
        self._graph(size, rank_class(max_rank)).graph.replay()

    def _prepare(self, size: int, step: DecodeStep) -> None:
        self._filled.synchronize()  # the last step's copy has left the staging memory
        self._inputs[size].fill(
            step, self._rows.tokens.shape[1], self._rows.max_rows, self._kv.scratch_page
        )
        self._filled.record()

    def _graph(self, size: int, rank: int) -> _Captured:
        key = (size, rank)
        if key not in self._captured:
            self._captured[key] = self._capture(size, rank)
        return self._captured[key]

    @torch.inference_mode()
    def _capture(self, size: int, rank: int) -> _Captured:
        device = self._rows.device
        if size not in self._inputs:
            self._inputs[size] = _Inputs(size, device)
        self._prepare(size, DecodeStep([], [], [], [], rank))
        self._compute(size, rank)  # what is made on first use is made outside the capture
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may page-lock memory for adapters meanwhile: their calls are not ours.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits, draw = self._compute(size, rank)
        return _Captured(graph, logits, draw)

    def _compute(self, size: int, rank: int) -> tuple[torch.Tensor, Draw]:
        inputs = self._inputs[size]
        tokens = self._rows.tokens.view(-1)
        lora = _lora(inputs.slots, rank)
        hidden = self._decoder.forward(
            tokens[inputs.source],
            inputs.positions,
            CapturedBatch(
                self._kv,
                inputs.locations,
                inputs.rows,
                inputs.positions,
                self._rows.page_table,
                self._arrived,
            ),
            lora,
        )
        logits = self._decoder.head(hidden)
        if self._decoder.has_plain_logits:
            draw = Draw(*greedy_kernel(logits.contiguous(), self._arrived))
        else:
            draw = greedy(self._decoder.finish_logits(logits))
        tokens.index_copy_(0, inputs.target, draw.tokens.clamp(min=0))
        return logits, draw


def _lora(slots: torch.Tensor, rank: int) -> LoraBatch:
    return LoraBatch.captured(slots, rank) if rank else LoraBatch.none(slots.device)


def batch_sizes(largest: int) -> list[int]:
    """The captured sizes: dense where a row more costs most, then in steps of 8, 16 and 32."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, largest + 1, 32)]
    return [n for n in sizes if n <= largest]


def rank_class(max_rank: int) -> int:
    """The smallest class that holds a rank."""
    if not max_rank:
        return _NO_LORA
    return next(rank for rank in RANK_CLASSES if max_rank <= rank)
