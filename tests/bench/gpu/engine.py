"""The shard's own engine over random weights, without a router: real plans, real worker."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from unittest.mock import Mock

import torch

from lorafleet.cache.device_tier import DeviceTier
from lorafleet.cache.host_memory import allocate
from lorafleet.cache.packed_form import plan_form
from lorafleet.cache.packing import PackedAdapter
from lorafleet.kernels import timing
from lorafleet.proto.messages import SamplingParams, SequenceStart, StepPlan
from lorafleet.shard.config import PAGE_SIZE
from lorafleet.shard.flash_attention import FlashAttention
from lorafleet.shard.group import Group
from lorafleet.shard.kv_pool import KvPool
from lorafleet.shard.model import Decoder
from lorafleet.shard.rows import RowTable
from lorafleet.shard.step_graphs import StepGraphs
from lorafleet.shard.streams import StepStream
from lorafleet.shard.worker import FastPath, Launched, Worker
from tests.bench.gpu.device import DEVICE, ON_CUDA, synchronize
from tests.bench.gpu.shapes import ALL_LINEAR, Shape

GRAPH_TOKENS = 256  # --cuda-graph-tokens, as served by default


@dataclass
class Engine:
    """One rank and what it runs on."""

    shape: Shape
    decoder: Decoder
    rows: RowTable
    pool: KvPool
    tier: DeviceTier
    worker: Worker
    graphs: StepGraphs | None
    _step: int = 0
    _next_page: int = 0
    _arena_end: int = 0
    _packed: dict[tuple[int, tuple[str, ...]], PackedAdapter] = field(default_factory=dict)

    @classmethod
    def build(
        cls, shape: Shape, max_rows: int, max_len: int, num_slots: int, arena_bytes: int
    ) -> Engine:
        """Random weights on the device; room for `max_rows` rows of `max_len` tokens."""
        decoder = Decoder(shape.config(), Group(0, 1, DEVICE, ""), torch.bfloat16, DEVICE)
        decoder.randomize(seed=0)
        decoder.optimize(max_len)
        rows = RowTable(max_rows, max_len, DEVICE)
        num_pages = max_rows * -(-max_len // PAGE_SIZE)
        pool = KvPool(
            shape.layers, num_pages, shape.kv_heads, shape.head_dim, torch.bfloat16, DEVICE
        )
        tier = DeviceTier(arena_bytes, num_slots, decoder.layout, torch.bfloat16, DEVICE)
        decoder.attach_adapters(tier)
        attention = None
        if FlashAttention.supports(decoder.dtype, DEVICE, shape.head_dim):
            attention = FlashAttention(pool, decoder.attention_kinds, shape.heads)
        elif ON_CUDA:
            print("FlashInfer is not installed: prompts attend in plain torch", flush=True)
        graphs = None
        if StepGraphs.supports(decoder):
            graphs = StepGraphs(decoder, rows, pool, attention, GRAPH_TOKENS)
        # No adapter is fetched here: moves go to the tier directly.
        worker = Worker(
            decoder, rows, pool, tier, Mock(), answers=False, fast=FastPath(attention, graphs)
        )
        return cls(shape, decoder, rows, pool, tier, worker, graphs)

    @torch.inference_mode()
    def load_adapters(
        self, ranks: Sequence[int], first_slot: int = 1, targets: tuple[str, ...] = ALL_LINEAR
    ) -> list[int]:
        """Binds random adapters of these ranks to slots from `first_slot` on."""
        if first_slot == 1:
            self._arena_end = 0
        slots = list(range(first_slot, first_slot + len(ranks)))
        for slot, rank in zip(slots, ranks, strict=True):
            packed = self.packed(rank, targets)
            self.tier.begin_move(packed, slot, self._arena_end)
            self._arena_end += packed.nbytes
        self.tier.wait_all()
        synchronize()
        self.tier.take_ready()
        return slots

    def packed(self, rank: int, targets: tuple[str, ...] = ALL_LINEAR) -> PackedAdapter:
        """A random adapter of these projections in page-locked memory, made once."""
        key = (rank, targets)
        if key not in self._packed:
            modules = self.decoder.layout.targets()
            names = [name for name in modules if name.rpartition(".")[2] in targets]
            form = plan_form(dict.fromkeys(names, rank), self.decoder.layout, 2)
            packed = allocate(form, torch.bfloat16, pin=ON_CUDA)
            noise = torch.randn(packed.buffer.shape, device=DEVICE) * 0.01
            packed.buffer.copy_(noise.to(torch.bfloat16))
            self._packed[key] = packed
        return self._packed[key]

    def prefill(self, slots: Sequence[int], length: int, step_tokens: int = 4096) -> float:
        """Starts row i with slot slots[i] and a random prompt; returns the seconds it took."""
        self._next_page = 0
        plans, plan = [], StepPlan(0)
        for row, slot in enumerate(slots):
            if sum(plan.token_counts) + length > step_tokens and plan.rows:
                plans.append(plan)
                plan = StepPlan(0)
            self._add_prompt(plan, row, slot, length)
        plans.append(plan)
        synchronize()
        started = time.perf_counter()
        for each in plans:
            self.finish(self.launch(each))
        synchronize()
        return time.perf_counter() - started

    def _add_prompt(self, plan: StepPlan, row: int, slot: int, length: int) -> None:
        ids = torch.randint(3, self.shape.vocab_size, (length,)).tolist()
        count = -(-length // PAGE_SIZE)
        plan.starts.append(SequenceStart(row, ids, length, SamplingParams()))
        plan.num_prefills += 1
        plan.rows.append(row)
        plan.first_positions.append(0)
        plan.token_counts.append(length)
        plan.slots.append(slot)
        plan.samples.append(True)
        plan.new_page_counts.append(count)
        plan.pages += range(self._next_page, self._next_page + count)
        self._next_page += count

    def decode_plan(self, slots: Sequence[int], position: int) -> StepPlan:
        """One token for each of the rows 0 .. len(slots) - 1, all at one position."""
        count = len(slots)
        starts_page = position % PAGE_SIZE == 0
        plan = StepPlan(
            0,
            rows=list(range(count)),
            first_positions=[position] * count,
            token_counts=[1] * count,
            slots=list(slots),
            samples=[True] * count,
            new_page_counts=[int(starts_page)] * count,
        )
        if starts_page:
            plan.pages = list(range(self._next_page, self._next_page + count))
            self._next_page += count
        return plan

    def decode_ms(self, slots: Sequence[int], context: int, steps: int = 48) -> float:
        """Median milliseconds between the results of pipelined decode steps, host included.

        Rows must hold `context` tokens. One step is queued behind the running one, as in service.
        """
        launched: deque[Launched] = deque()
        times: list[float] = []
        for position in range(context, context + steps):
            launched.append(self.launch(self.decode_plan(slots, position)))
            if len(launched) > 1:
                self.finish(launched.popleft())
                times.append(time.perf_counter())
        self.finish(launched.popleft())
        gaps = [b - a for a, b in pairwise(times[8:])]
        return 1e3 * statistics.median(gaps)

    def replay_ms(self, repeats: int = 20) -> float:
        """Milliseconds of the last decode step's graph alone, back to back; NaN without graphs."""
        if self.graphs is None:
            return math.nan
        return timing.elapsed_ms(self.graphs.replay, repeats)

    def launch(self, plan: StepPlan) -> Launched:
        """Queues a plan as the next step."""
        self._step += 1
        plan.step = self._step
        return self.worker.launch(StepStream(), plan)

    def finish(self, launched: Launched) -> list[int]:
        """The tokens of a step, once it is done."""
        return self.worker.finish(launched).tokens
