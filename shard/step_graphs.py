"""StepGraphs: steps of few tokens as captured CUDA graphs, one per form, size and LoRA class.

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

from lorafleet.kernels.decode_attention.op import supports
from lorafleet.kernels.greedy.op import greedy as greedy_kernel
from lorafleet.kernels.lora.op import MAX_DECODE_TOKENS, LoraBatch
from lorafleet.shard.flash_attention import CapturedFlash, FlashAttention
from lorafleet.shard.kv_pool import KvPool
from lorafleet.shard.lora_class import NO_LORA, LoraClass
from lorafleet.shard.model import Decoder
from lorafleet.shard.rows import RowTable
from lorafleet.shard.sampling import Draw, greedy
from lorafleet.shard.step_forms import DecodeForm, PromptForm, StepForm
from lorafleet.shard.step_inputs import StepInputs
from lorafleet.shard.token_step import TokenStep

log = logging.getLogger(__name__)

_MAX_FLASH_ROWS = 64  # of a step with prompts: each costs a tile, and a graph launches all it has


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor
    draw: Draw
    lora: LoraBatch  # owns counters that the graph's kernels read and write


@dataclass(frozen=True, slots=True)
class _Key:
    """What a graph is chosen by."""

    form: StepForm
    size: int
    lora: LoraClass


class StepGraphs:
    """Captures and replays. Belongs to the compute thread."""

    def __init__(
        self,
        decoder: Decoder,
        rows: RowTable,
        pool: KvPool,
        flash: FlashAttention | None,
        max_tokens: int,
    ) -> None:
        """For steps of up to `max_tokens`; captures nothing yet.

        Without `flash`, or up to MAX_DECODE_TOKENS, there is the decode form only.
        """
        self._decoder, self._rows, self._kv = decoder, rows, pool
        self.max_tokens = max_tokens
        self._pool = torch.cuda.graph_pool_handle()
        # Of its own: cuBLAS's workspaces belong to a stream, and go with any graph captured on it.
        self._stream = torch.cuda.Stream(rows.device)
        units = MAX_DECODE_TOKENS * decoder.partition.local_kv_heads
        self._arrived = torch.zeros(units, dtype=torch.int32, device=rows.device)
        self._decodes = DecodeForm(rows, pool, self._arrived, max_tokens)
        self._prompts: PromptForm | None = None
        if flash is not None and max_tokens > MAX_DECODE_TOKENS:
            max_rows, max_pages = min(rows.max_rows, _MAX_FLASH_ROWS), rows.page_table.shape[1]
            captured = CapturedFlash(flash, max_tokens, max_rows, max_pages)
            self._prompts = PromptForm(rows, captured, max_tokens)
        self._inputs: dict[tuple[StepForm, int], StepInputs] = {}
        self._captured: dict[_Key, _Captured] = {}
        self._last: _Key | None = None
        self._filled = torch.cuda.Event()
        rows.page_table[rows.max_rows] = pool.scratch_page

    @staticmethod
    def supports(decoder: Decoder) -> bool:
        """Whether the decoder's steps can be captured."""
        part = decoder.partition
        if decoder.device.type != "cuda" or decoder.has_experts:
            return False
        return supports(decoder.dtype, part.local_heads, part.local_kv_heads, part.head_dim)

    def capture_all(self) -> None:
        """Captures every size, without adapters and with those of the usual ranks.

        The largest go first, so that the others fit into their memory.
        """
        forms: list[StepForm] = [self._decodes]
        if self._prompts is not None:
            forms.insert(0, self._prompts)
        keys = [
            _Key(form, size, lora)
            for form in forms
            for size in reversed(form.sizes)
            for lora in form.lora_classes(size)
        ]
        started = time.perf_counter()
        for key in keys:
            self._graph(key)
        log.info("captured %d graphs in %.1f s", len(keys), time.perf_counter() - started)

    def fits(self, step: TokenStep) -> bool:
        """Whether the step can be replayed."""
        if step.prompts is None:
            return len(step.rows) <= self._decodes.sizes[-1]
        return self._prompts is not None and self._prompts.fits(step.prompts, len(step.rows))

    @torch.inference_mode()
    def run(self, step: TokenStep) -> tuple[torch.Tensor, Draw]:
        """Queues a step that fits: what the head gives [num_draws, vocab], and the greedy choice.

        Both are valid until the next call; the greedy tokens are already in the row table.
        """
        self._last = key = self._key(step)
        captured = self._graph(key)
        self._prepare(key, step)
        captured.graph.replay()
        count = len(step.drawn)
        draw = Draw(captured.draw.tokens[:count], captured.draw.logprobs[:count])
        return captured.logits[:count], draw

    def replay(self) -> None:
        """Queues the last step's graph again over its inputs, to be timed."""
        assert self._last is not None
        self._graph(self._last).graph.replay()

    def _key(self, step: TokenStep) -> _Key:
        form: StepForm | None = self._decodes if step.prompts is None else self._prompts
        assert form is not None
        size = form.sizes[bisect_left(form.sizes, len(step.rows))]
        return _Key(form, size, form.lora_class(step, size))

    def _prepare(self, key: _Key, step: TokenStep) -> None:
        self._filled.synchronize()  # the last step's copy has left the staging memory
        width = self._rows.tokens.shape[1]
        self._inputs[key.form, key.size].fill(
            step, width, self._rows.max_rows, self._kv.scratch_page
        )
        self._filled.record()
        key.form.prepare(step)

    def _graph(self, key: _Key) -> _Captured:
        if key not in self._captured:
            self._captured[key] = self._capture(key)
        return self._captured[key]

    @torch.inference_mode()
    def _capture(self, key: _Key) -> _Captured:
        device, at = self._rows.device, (key.form, key.size)
        if at not in self._inputs:
            self._inputs[at] = key.form.inputs(key.size)
        inputs = self._inputs[at]
        self._prepare(key, key.form.padding(key.size, key.lora.max_rank))
        lora = LoraBatch.none(device)
        if key.lora != NO_LORA:
            lora = key.form.lora(inputs, key.lora)
        self._compute(key.form, inputs, lora)  # what is made on first use is made outside
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may page-lock memory for adapters meanwhile: their calls are not ours.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            logits, draw = self._compute(key.form, inputs, lora)
        return _Captured(graph, logits, draw, lora)

    def _compute(
        self, form: StepForm, inputs: StepInputs, lora: LoraBatch
    ) -> tuple[torch.Tensor, Draw]:
        columns, tokens = inputs.columns, self._rows.tokens.view(-1)
        hidden = self._decoder.forward(
            tokens[columns.source], columns.positions, form.paged(inputs), lora
        )
        logits = self._decoder.head(hidden[columns.drawn])
        if self._decoder.has_plain_logits:
            found = greedy_kernel(logits.contiguous(), self._arrived, tokens, columns.target)
            return logits, Draw(*found)
        draw = greedy(self._decoder.finish_logits(logits))
        tokens.index_copy_(0, columns.target, draw.tokens.clamp(min=0))
        return logits, draw
