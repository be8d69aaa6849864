"""Worker: runs plans in order; owns the device."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import torch

from lorafleet.cache.device_tier import DeviceTier
from lorafleet.cache.errors import AdapterNotFound
from lorafleet.cache.packing import PackedAdapter
from lorafleet.cache.store import AdapterStore
from lorafleet.proto.messages import AdapterContent, AdapterMove, StepPlan, StepResult
from lorafleet.shard.batch import Batch, build_batch
from lorafleet.shard.flash_attention import FlashAttention
from lorafleet.shard.kv_pool import KvPool
from lorafleet.shard.model import Decoder
from lorafleet.shard.rows import RowTable
from lorafleet.shard.sampling import LOWEST_LOGPROB, Draw, is_greedy, sample, top_logprobs
from lorafleet.shard.step_graphs import StepGraphs
from lorafleet.shard.streams import StepStream
from lorafleet.shard.token_step import token_step
from lorafleet.shard.transfers import to_device, to_host

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.0002  # how often to look whether the device finished while waiting for a plan


@dataclass(frozen=True, slots=True)
class FastPath:
    """What a CUDA device may have instead of plain torch."""

    attention: FlashAttention | None = None
    graphs: StepGraphs | None = None


@dataclass(slots=True)
class Launched:
    """A step whose work is queued on the device. Tensors are ready once `event` is."""

    stream: StepStream
    plan: StepPlan
    started: float
    event: torch.cuda.Event | None = None
    columns: dict[str, torch.Tensor] = field(default_factory=dict)

    def is_done(self) -> bool:
        """Whether the device has finished the step."""
        return self.event is None or self.event.query()


class Worker:
    """The compute loop of one rank.

    It keeps one step queued behind the running one: a plan is launched as soon as it arrives, and
    only then is the result of the step before it read.
    """

    def __init__(
        self,
        decoder: Decoder,
        rows: RowTable,
        pool: KvPool,
        adapters: DeviceTier,
        store: AdapterStore,
        answers: bool,
        fast: FastPath = FastPath(),
    ) -> None:
        """`answers`: whether this rank sends results (rank 0)."""
        self._decoder, self._rows, self._pool = decoder, rows, pool
        self._adapters, self._store, self._answers = adapters, store, answers
        self._fast = fast
        self._launched: deque[Launched] = deque()

    def run(self, work: SimpleQueue[tuple[StepStream, StepPlan] | None]) -> None:
        """Runs plans until the queue yields None. Any exception is the end of this process."""
        while True:
            try:
                item = work.get(timeout=_POLL_SECONDS) if self._launched else work.get()
            except Empty:
                self._finish_done()
                continue
            if item is None:
                return
            launched = self._launch_or_die(*item)
            if launched is not None:
                self._launched.append(launched)
                if len(self._launched) > 1 or self._decoder.device.type == "cpu":
                    self._finish()

    def _finish_done(self) -> None:
        if self._launched[0].is_done():
            self._finish()

    def _launch_or_die(self, stream: StepStream, plan: StepPlan) -> Launched | None:
        """None for a plan of a fenced-off stream, which is void."""
        try:
            return self.launch(stream, plan) if stream.is_open else None
        except Exception as error:
            if isinstance(error, AdapterNotFound) and not stream.is_open:
                return None  # what only that stream knew went while its plan was looked at
            log.critical(
                "step %d failed: %d starts, %d moves, %d prefill and %d decode rows, %d tokens",
                plan.step, len(plan.starts), len(plan.moves), plan.num_prefills,
                len(plan.rows) - plan.num_prefills, sum(plan.token_counts),
            )  # fmt: skip
            raise

    def _finish(self) -> None:
        launched = self._launched.popleft()
        result = self.finish(launched)
        if self._answers:
            launched.stream.answer(result)

    @torch.inference_mode()
    def launch(self, stream: StepStream, plan: StepPlan) -> Launched:
        """Queues a step's work; on CPU this is the work itself."""
        launched = Launched(stream, plan, time.perf_counter())
        sources = [(move, self._source(move, plan)) for move in plan.moves]
        for move, adapter in sources:
            if adapter is not None:
                extents = list(zip(move.extent_offsets, move.extent_bytes, strict=True))
                self._adapters.begin_scattered(adapter, move.slot, extents)
        for start in plan.starts:
            self._rows.begin(start)
        self._rows.append_pages(plan)
        if plan.rows:
            self._compute(plan, launched)
        else:
            self._adapters.wait_all()  # nothing else to do: answer when the adapters are there
        if self._decoder.device.type == "cuda":
            launched.event = torch.cuda.Event()
            launched.event.record()
        return launched

    def _source(self, move: AdapterMove, plan: StepPlan) -> PackedAdapter | None:
        """What a move copies. Raises AdapterNotFound if it is not in host memory.

        On a rank that is behind it may have been dropped: the router heard from rank 0 that the
        adapter is there, and evicted it again. Then nobody uses the slot as it is, and None is
        right. A step with rows is no such case: in it, ranks wait for each other.
        """
        try:
            return self._store.host(AdapterContent(move.key, move.digest))
        except AdapterNotFound:
            if self._answers or move.slot in plan.slots:
                raise
            return None

    def finish(self, launched: Launched) -> StepResult:
        """Reads a step's results, waiting for the device if it must."""
        if launched.event is not None:
            launched.event.synchronize()
        columns = {name: tensor.tolist() for name, tensor in launched.columns.items()}
        elapsed = int((time.perf_counter() - launched.started) * 1e6)
        return StepResult(
            launched.plan.step,
            **columns,
            ready_slots=self._adapters.take_ready(),
            compute_us=elapsed,
        )

    def _compute(self, plan: StepPlan, launched: Launched) -> None:
        self._adapters.wait({slot for slot in plan.slots if slot})
        graphs = self._fast.graphs
        if graphs is not None and self._is_plain(plan, graphs.max_tokens):
            step = token_step(plan, self._rows, self._max_rank(plan))
            if graphs.fits(step):
                self._answer_replayed(plan, *graphs.run(step), launched)
                return
        batch = build_batch(
            plan, self._rows, self._pool, self._max_rank(plan), self._fast.attention
        )
        wants_all = self._wants_prompt_logprobs(plan)
        hidden = self._decoder.forward(
            batch.token_ids, batch.positions, batch.paged, batch.lora,
            None if wants_all else batch.last_tokens(),
        )  # fmt: skip
        if batch.sample_rows:
            drawn = hidden[batch.sample_tokens] if wants_all else hidden
            logits = self._decoder.logits(drawn, batch.sample_segments)
            draw = self._draw(logits, batch.sample_rows, batch.sample_positions)
            launched.columns |= self._answer(logits, draw, batch.sample_rows)
        if wants_all:
            launched.columns |= self._prompt_logprobs(plan, batch, hidden)

    def _max_rank(self, plan: StepPlan) -> int:
        return max(map(self._adapters.rank, plan.slots))

    def _is_plain(self, plan: StepPlan, max_tokens: int) -> bool:
        """Whether a captured graph of so many tokens may compute all that the plan asks for."""
        return (
            sum(plan.token_counts) <= max_tokens
            and not self._wants_prompt_logprobs(plan)
            # A graph holds the sites' work and nothing of parts.
            and not any(map(self._adapters.parts, plan.slots))
        )

    def _wants_prompt_logprobs(self, plan: StepPlan) -> bool:
        prompts = plan.rows[: plan.num_prefills]
        return any(self._rows.sampling[row].prompt_logprobs for row in prompts)

    def _answer_replayed(
        self, plan: StepPlan, raw: torch.Tensor, draw: Draw, launched: Launched
    ) -> None:
        """Results of a step's graph: of the rows that sample, as it chose or as they ask for."""
        sampling = [i for i, samples in enumerate(plan.samples) if samples]
        if not sampling:
            return
        rows = [plan.rows[i] for i in sampling]
        params = [self._rows.sampling[row] for row in rows]
        if all(is_greedy(p) and not p.num_top_logprobs for p in params):
            launched.columns |= {"tokens": to_host(draw.tokens), "logprobs": to_host(draw.logprobs)}
            return
        logits = self._decoder.finish_logits(raw)
        if not all(map(is_greedy, params)):
            positions = [plan.first_positions[i] + plan.token_counts[i] for i in sampling]
            draw = self._draw(logits, rows, positions)
        launched.columns |= self._answer(logits, draw, rows)

    def _draw(self, logits: torch.Tensor, rows: list[int], positions: list[int]) -> Draw:
        """Samples the tokens of `rows` and writes them to the row table at `positions`."""
        index = to_device(torch.tensor(rows), self._rows.device)
        draw = sample(
            logits,
            [self._rows.sampling[row] for row in rows],
            positions,
            [self._rows.num_prompt_tokens[row] for row in rows],
            lambda picked, length: self._rows.tokens[index[picked], :length],
        )
        places = to_device(torch.tensor(positions), self._rows.device)
        self._rows.tokens[index, places] = draw.tokens.clamp(min=0)
        return draw

    def _answer(self, logits: torch.Tensor, draw: Draw, rows: list[int]) -> dict[str, torch.Tensor]:
        columns = {"tokens": to_host(draw.tokens), "logprobs": to_host(draw.logprobs)}
        counts = [self._rows.sampling[row].num_top_logprobs for row in rows]
        if any(counts):
            ids, logprobs = top_logprobs(logits, max(counts))
            # Picked on the host: how many there are is known only there.
            keep = torch.arange(max(counts)) < torch.tensor(counts).unsqueeze(1)
            kept = to_device(keep.flatten().nonzero().squeeze(1), ids.device)
            columns["top_ids"] = to_host(ids.flatten()[kept])
            columns["top_logprobs"] = to_host(logprobs.flatten()[kept])
        return columns

    def _prompt_logprobs(
        self, plan: StepPlan, batch: Batch, hidden: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """log p(next prompt token) at every position of the rows that asked, token by token."""
        found: list[torch.Tensor] = []
        for span, row, slot in zip(batch.spans, plan.rows, plan.slots, strict=False):
            if self._rows.sampling[row].prompt_logprobs:
                last = self._rows.num_prompt_tokens[row] - 1
                count = min(span.stop - span.start, max(0, last - span.first))
                states = hidden[span.start : span.start + count]
                logits = self._decoder.logits(states, [(slot, 0, count)])
                nexts = self._rows.tokens[row, span.first + 1 : span.first + 1 + count]
                logprobs = logits.log_softmax(-1).gather(1, nexts.unsqueeze(1)).squeeze(1)
                found.append(logprobs.clamp_(min=LOWEST_LOGPROB))
        return {"prompt_logprobs": to_host(torch.cat(found))}
