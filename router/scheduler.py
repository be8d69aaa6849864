"""Scheduler: decides every step. `plan` and `apply` are plain methods: no I/O, no clock, no await.

A plan takes the running sequences that decode first, one token each. What is left of the step's
budget goes to prompts, running and waiting, in turn between adapters (`turns`, `shares`).

When pages run out, a sequence of the adapter with the most rows is preempted, its youngest: it
gives up its row and pages, goes back to its place in its line, and recomputes when admitted again.
The oldest of all never is. So it can always go on, and with it everything behind. An adapter that
has no row when its turn comes takes one from the adapter with the most in the same way.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lorafleet.cache.slots import SlotLedger
from lorafleet.proto.messages import ShardInfo, StepPlan, StepResult
from lorafleet.router.adapter import Adapter
from lorafleet.router.admission import MAX_OVERTAKES, Admission
from lorafleet.router.device import DeviceSlots
from lorafleet.router.errors import GenerationFailed, RequestError
from lorafleet.router.kv import KvPages
from lorafleet.router.request import FinishReason, TokenEvent
from lorafleet.router.running import RunningSet
from lorafleet.router.sequence import Sequence, Status
from lorafleet.router.shares import QUANTUM_TOKENS, Shares
from lorafleet.router.step import Sample, Step
from lorafleet.router.turns import AGEING_SECONDS, Turns
from lorafleet.router.waiting import WaitingQueue

Event = tuple[Sequence, TokenEvent | RequestError]


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """The router's own dials on scheduling."""

    prefill_chunk_tokens: int = 0  # 0 = up to the step's budget
    prefix_caching: bool = True
    max_overtakes: int = MAX_OVERTAKES
    max_running: int = 0  # rows one adapter, or the base model, may have; 0 = any number
    quantum_tokens: int = QUANTUM_TOKENS
    ageing_seconds: float = AGEING_SECONDS


class Scheduler:
    """Owns sequences, rows, pages and slots. Plans must be sent, and results applied, in order."""

    def __init__(
        self,
        info: ShardInfo,
        limits: SchedulerLimits,
        on_loaded: Callable[[Adapter, float], None] = lambda adapter, seconds: None,
        on_evicted: Callable[[Any], None] = lambda adapter: None,
    ) -> None:
        """`on_loaded` hears of each Adapter's copy to the device, `on_evicted` of its going."""
        self.num_steps = 0  # plans made
        self.num_preemptions = 0
        self.kv = KvPages(info.num_pages, info.page_size, limits.prefix_caching)
        self.device = DeviceSlots(
            SlotLedger(info.num_slots, info.arena_bytes, info.arena_alignment, on_evicted),
            on_loaded,
        )
        self.waiting = WaitingQueue()
        self.running = RunningSet(info.max_rows, self.kv, self.device.ledger)
        self._max_step_tokens = info.max_step_tokens
        self._eos_token_ids = frozenset(info.eos_token_ids)
        self._shares = Shares(limits.quantum_tokens)
        self._admission = Admission(
            self.waiting,
            self.running,
            self.kv,
            self.device,
            self._shares,
            Turns(self.waiting, self.running, self._shares, limits.ageing_seconds),
            chunk_tokens=limits.prefill_chunk_tokens or info.max_step_tokens,
            max_running=limits.max_running,
            max_overtakes=limits.max_overtakes,
        )
        self._in_flight: deque[Step] = deque()

    @property
    def num_in_flight(self) -> int:
        """Plans whose results have not been applied."""
        return len(self._in_flight)

    def submit(self, sequence: Sequence) -> None:
        """A new sequence waits. It must fit: `pages_for(max_tokens - 1)` of the group's pages."""
        if not self.waiting:
            self._shares.forgive()
        self.waiting.push(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Ends a sequence at once and frees what it holds; nothing if it has ended."""
        self._end(sequence)

    def plan(self, now: float) -> StepPlan | None:
        """The next step to send; None if there is nothing to do before a result arrives."""
        step = Step(self.num_steps + 1, self._max_step_tokens)
        self._make_way()
        num_preemptions = self.num_preemptions
        self._decode(step)
        self.device.load_asked(step, now)
        # When pages have just run out, nobody new gets any.
        may_start = self.num_preemptions == num_preemptions
        self._admission.fill(step, now, may_start=may_start)
        # With no rows to compute, a plan makes the shard wait for its copies and report them.
        if step.is_empty and (self._in_flight or not self.device.num_loading):
            return None
        self.num_steps += 1
        self._in_flight.append(step)
        plan = step.close()
        # Only now, so that no row of this step reads what another row of it writes.
        for sequence in step.prefilled:
            self.kv.index(sequence)
        return plan

    def apply(self, result: StepResult, now: float) -> list[Event]:
        """Takes in the result of the oldest plan in flight; returns what its sequences hear."""
        step = self._in_flight.popleft()
        self.device.set_ready(result.ready_slots, now)
        # The token of a sequence that ended while this step was in flight is discarded.
        return [
            (sample.sequence, self._take(sample, now))
            for sample in step.read(result)
            if sample.sequence.status is not Status.DONE
        ]

    def check(self) -> None:
        """Asserts that every ledger balances against the running sequences."""
        self.running.check()
        assert all(sequence.lease is None for sequence in self.waiting)

    def _make_way(self) -> None:
        """Lets an adapter whose turn it was, and that has no row, take one."""
        claim = self._admission.take_claim()
        if claim is None or claim.sequence.status is not Status.WAITING:
            return
        if claim.needs_row and self.running.has_row:
            return
        victim = self.running.spare(claim.sequence.request.priority)
        if victim is not None:
            self._preempt(victim)

    def _decode(self, step: Step) -> None:
        num_tokens: Counter[Adapter | None] = Counter()
        # By standing, so that whoever has to yield is not in the step yet.
        for sequence in list(self.running.by_standing):
            if step.budget == 0:
                break
            # One that had to yield just now is waiting again.
            if not sequence.is_running or sequence.is_prefilling:
                continue
            if sequence.can_decode and (pages := self._grow(sequence)) is not None:
                step.add(sequence, 1, pages)
                num_tokens[sequence.adapter] += 1
        for adapter, count in num_tokens.items():
            self._shares.charge(adapter, count)

    def _grow(self, sequence: Sequence) -> list[int] | None:
        """The page its next position needs, if any; None if the sequence itself had to yield."""
        if not self.kv.needs_page(sequence):
            return []
        while not self.kv.prefix.make_room(1):
            victim = self.running.by_standing[-1]
            self._preempt(victim)
            if victim is sequence:
                return None
        assert sequence.lease is not None
        return sequence.lease.grow(1)

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        sequence.num_paid = max(sequence.num_paid, sequence.num_planned)
        self.running.remove(sequence, Status.WAITING)
        self.waiting.push(sequence)

    def _take(self, sample: Sample, now: float) -> TokenEvent | RequestError:
        """Appends a sampled token to its sequence, or fails that sequence alone."""
        sequence, token = sample.sequence, sample.token
        if token < 0:
            self.kv.distrust(sequence)
            self._end(sequence)
            return GenerationFailed("the model's output for this sequence is not finite")
        sequence.tokens.append(token)
        sequence.first_token_at = sequence.first_token_at or now
        if sequence.is_running:
            self.kv.index(sequence)
        finish = self._finish(sequence, token)
        if finish is not None:
            self._end(sequence)
        return TokenEvent(token, sample.logprob, sample.top, finish)

    def _finish(self, sequence: Sequence, token: int) -> FinishReason | None:
        request = sequence.request
        own = request.eos_token_ids
        if not request.ignore_eos and token in (self._eos_token_ids if own is None else own):
            return FinishReason.EOS_TOKEN
        return FinishReason.LENGTH if len(sequence.tokens) == sequence.max_tokens else None

    def _end(self, sequence: Sequence) -> None:
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        elif sequence.is_running:
            self.running.remove(sequence, Status.DONE)
        sequence.status = Status.DONE
