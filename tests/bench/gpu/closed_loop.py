"""A closed loop over the engine: a row whose sequence has ended begins the next at once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from lorafleet.proto.messages import SamplingParams, SequenceStart, StepPlan
from lorafleet.shard.config import PAGE_SIZE
from lorafleet.shard.worker import Launched
from tests.bench.gpu.engine import Engine
from tests.bench.gpu.popularity import Request

MAX_STEP_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Step:
    """What a step held, and when its result was read (seconds on the monotonic clock)."""

    finished_at: float
    rows: int
    prompt_tokens: int
    new_tokens: int
    kv_tokens: int  # read by attention
    adapters: int  # distinct


@dataclass(slots=True)
class _Sequence:
    """A row's request, and how far it is."""

    slot: int
    prompt_tokens: int
    left: int  # tokens to generate
    position: int = 0  # of the next token to compute


class ClosedLoop:
    """Plans steps for `batch` rows as the router would, and runs them one step ahead.

    Row i owns pages i * n .. (i + 1) * n - 1, n = pages of `max_tokens` tokens.
    """

    def __init__(self, engine: Engine, batch: int, max_tokens: int) -> None:
        self._engine, self._batch = engine, batch
        self._pages = -(-max_tokens // PAGE_SIZE)
        self._random = Random(0)
        self._rows: dict[int, _Sequence] = {}

    def run(self, requests: Iterable[Request], max_new_tokens: int = 0) -> list[Step]:
        """Runs until a row finds no request any more, or `max_new_tokens` are there (0 = never).

        A request's adapter is its slot. What still runs at the end is abandoned.
        """
        self._rows.clear()
        pending = iter(requests)
        launched: deque[tuple[Launched, Step]] = deque()
        steps: list[Step] = []
        new_tokens = 0
        while (plan := self._plan(pending)) is not None:
            launched.append((self._engine.launch(plan), self._describe(plan)))
            if len(launched) > 1:
                steps.append(self._finish(*launched.popleft()))
            new_tokens += len(plan.rows)
            if max_new_tokens and new_tokens >= max_new_tokens:
                break
        return steps + [self._finish(*each) for each in launched]

    def _finish(self, launched: Launched, step: Step) -> Step:
        self._engine.finish(launched)
        return Step(time.perf_counter(), *(getattr(step, name) for name in Step.__slots__[1:]))

    def _plan(self, pending: Iterator[Request]) -> StepPlan | None:
        """The next step: new prompts, then a token for every other row; None at the end."""
        plan, decodes = StepPlan(0), sorted(self._rows, key=lambda row: self._rows[row].slot)
        for row, request in self._starts(pending):
            if request is None:
                return None
            self._rows[row] = _Sequence(
                request.adapter, request.prompt_tokens, request.output_tokens
            )
        prompts = [row for row in self._rows if self._rows[row].position == 0]
        for row in sorted(prompts, key=lambda row: self._rows[row].slot):
            self._add_prompt(plan, row)
        for row in decodes:
            self._add(plan, row, 1)
        for row in [row for row, sequence in self._rows.items() if not sequence.left]:
            del self._rows[row]
        return plan

    def _starts(self, pending: Iterator[Request]) -> Iterator[tuple[int, Request | None]]:
        """Requests for the free rows, within the step's budget; None where they ran out."""
        budget = MAX_STEP_TOKENS - len(self._rows)
        for row in [row for row in range(self._batch) if row not in self._rows]:
            if budget <= 0:
                return
            request = next(pending, None)
            yield row, request
            if request is None:
                return
            budget -= request.prompt_tokens

    def _add_prompt(self, plan: StepPlan, row: int) -> None:
        count = self._rows[row].prompt_tokens
        ids = self._random.choices(range(self._engine.shape.vocab_size), k=count)
        plan.starts.append(SequenceStart(row, ids, count, SamplingParams()))
        plan.num_prefills += 1
        self._add(plan, row, count)

    def _add(self, plan: StepPlan, row: int, tokens: int) -> None:
        sequence = self._rows[row]
        held = -(-sequence.position // PAGE_SIZE)
        needed = -(-(sequence.position + tokens) // PAGE_SIZE)
        assert needed <= self._pages, "a request is longer than the loop has pages for"
        plan.rows.append(row)
        plan.first_positions.append(sequence.position)
        plan.token_counts.append(tokens)
        plan.slots.append(sequence.slot)
        plan.samples.append(True)
        plan.new_page_counts.append(needed - held)
        plan.pages += range(row * self._pages + held, row * self._pages + needed)
        sequence.position += tokens
        sequence.left -= 1

    def _describe(self, plan: StepPlan) -> Step:
        ends = zip(plan.first_positions, plan.token_counts, strict=True)
        return Step(
            finished_at=0.0,
            rows=len(plan.rows),
            prompt_tokens=sum(plan.token_counts[: plan.num_prefills]),
            new_tokens=len(plan.rows),
            kv_tokens=sum(first + count for first, count in ends),
            adapters=len(set(plan.slots) - {0}),
        )


def seconds(steps: list[Step]) -> list[float]:
    """From each step's result to the next one's; one less than there are steps."""
    return [after.finished_at - before.finished_at for before, after in pairwise(steps)]
