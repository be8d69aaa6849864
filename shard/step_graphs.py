"""StepGraphs: steps of few tokens as captured CUDA graphs, one per token count and LoRA class.

A graph holds everything from the input tokens to the greedy choice. What changes between steps is
read from fixed buffers, filled from page-locked memory before each replay; tokens beyond the
step's own are padding, which reads and writes a scratch row and a scratch page only.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from dataclasses import dataclass

import torch

from lorafleet.kernels.decode_attention.op import decode_attention, supports
from lorafleet.kernels.fetch.op import fetch_
from lorafleet.kernels.greedy.op import greedy as greedy_kernel
from lorafleet.kernels.lora.op import LoraBatch
from lorafleet.shard.attention import AttentionKind
from lorafleet.shard.config import PAGE_SIZE
from lorafleet.shard.kv_pool import KvPool
from lorafleet.shard.model import Decoder
from lorafleet.shard.rows import RowTable
from lorafleet.shard.sampling import Draw, greedy
from lorafleet.shard.token_step import TokenStep

log = logging.getLogger(__name__)

# Largest rank of an adapter in the step: the grids of the LoRA kernels are captured for it.
RANK_CLASSES = (16, 64, 512)
_NO_LORA = 0
MAX_TOKENS = 256  # more keep a device busy by themselves


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor
    draw: Draw


class _Inputs:
    """The buffers that one token count's graphs read, and what fills them."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._staging = torch.zeros(7, size, dtype=torch.int64, pin_memory=True)
        self._columns = torch.zeros(7, size, dtype=torch.int64, device=device)
        # The token and its successor in the flat token table, then row, position, location and
        # the first position of the row that this step may write; int64.
        self.source, self.target, self.rows, self.positions, self.locations, self.fresh, _ = (
            self._columns
        )
        self.slots = self._columns[6].view(torch.int32)[:size]

    def fill(self, step: TokenStep, row_width: int, scratch_row: int, scratch_page: int) -> None:
        """Queues the copy of a step's columns; the staging memory must be free again."""
        count = len(step.rows)
        source, target, rows, positions, locations, fresh, slots = self._staging
        rows[:count], rows[count:] = step.rows, scratch_row
        positions[:count], positions[count:] = step.positions, 0
        locations[:count], locations[count:] = step.locations, scratch_page * PAGE_SIZE
        slots.zero_()
        slots.view(torch.int32)[:count] = step.slots
        torch.add(positions, rows, alpha=row_width, out=source)
        torch.add(source, 1, out=target)
        target[:count][~step.draws] = scratch_row * row_width
        fresh.copy_(positions)
        if step.has_prompts:
            fresh.zero_()
        # Not by the copy engine, which may be busy with an adapter for longer than a step.
        fetch_(self._columns, self._staging)


@dataclass(frozen=True, slots=True)
class CapturedBatch:
    """A step's attention at fixed addresses, as the layers read it."""

    pool: KvPool
    locations: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    fresh: torch.Tensor
    page_table: torch.Tensor
    arrived: torch.Tensor

    def attend(self, layer: int, query: torch.Tensor, kind: AttentionKind) -> torch.Tensor:
        """Attention [num_tokens, heads, head_dim]."""
        return decode_attention(
            query.contiguous(), self.pool.keys[layer], self.pool.values[layer], self.page_table,
            self.rows, self.positions, self.fresh, self.arrived, *kind,
        )  # fmt: skip


class StepGraphs:
    """Captures and replays. Belongs to the compute thread."""

    def __init__(self, decoder: Decoder, rows: RowTable, pool: KvPool) -> None:
        """Captures nothing yet."""
        self._decoder, self._rows, self._kv = decoder, rows, pool
        self._sizes = token_counts(MAX_TOKENS)
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
        """Captures every token count, without adapters and with those of the usual ranks.

        The largest goes first, so that the others fit into its memory.
        """
        keys = [(n, rank) for n in reversed(self._sizes) for rank in (_NO_LORA, *RANK_CLASSES[:2])]
        started = time.perf_counter()
        for size, rank in keys:
            self._graph(size, rank)
        log.info("captured %d graphs in %.1f s", len(keys), time.perf_counter() - started)

    @torch.inference_mode()
    def run(self, step: TokenStep) -> tuple[torch.Tensor, Draw]:
        """Queues a step of at most MAX_TOKENS: what the head gives [num_tokens, vocab], and the
        greedy choice after every token.

        Both are valid until the next call; where the step draws, they are in the row table too.
        """
        count = len(step.rows)
        size = self._sizes[bisect_left(self._sizes, count)]
        captured = self._graph(size, rank_class(step.max_rank))
        self._prepare(size, step)
        captured.graph.replay()
        draw = Draw(captured.draw.tokens[:count], captured.draw.logprobs[:count])
        return captured.logits[:count], draw

    def replay(self, num_tokens: int, max_rank: int) -> None:
        """Queues the graph of such a step once more over its last inputs, to be timed."""
        size = self._sizes[bisect_left(self._sizes, num_tokens)]
        self._graph(size, rank_class(max_rank)).graph.replay()

    def _prepare(self, size: int, step: TokenStep) -> None:
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
        self._prepare(size, TokenStep.empty(rank))
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
                inputs.fresh,
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


def token_counts(largest: int) -> list[int]:
    """The captured sizes: dense where a token more costs most, then in steps of 8, 16 and 32."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, largest + 1, 32)]
    return [n for n in sizes if n <= largest]


def rank_class(max_rank: int) -> int:
    """The smallest class that holds a rank."""
    if not max_rank:
        return _NO_LORA
    return next(rank for rank in RANK_CLASSES if max_rank <= rank)
