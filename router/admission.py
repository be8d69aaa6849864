"""Admission: who gets what a step has left after its decodes, and which adapters to load for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from lorafleet.router.device import DeviceSlots
from lorafleet.router.kv import KvPages
from lorafleet.router.overtakes import Overtakes
from lorafleet.router.running import RunningSet
from lorafleet.router.sequence import Sequence
from lorafleet.router.shares import Shares
from lorafleet.router.step import Step
from lorafleet.router.turns import Turns
from lorafleet.router.waiting import WaitingQueue

# Sequences that may start before one whose turn it is and whose adapter finds no slot. Past it,
# nothing else is admitted or loaded until that one is: running sequences end, copies under way
# finish, so it gets its slot within the time the sequences then running need.
MAX_OVERTAKES = 64

# Lines looked at, for adapters to load ahead, once no more sequences can be admitted.
MAX_LOOKAHEAD = 32

# Adapters found no place for in one scan before it stops looking for places.
MAX_FAILED_LOADS = 8


class Claim(NamedTuple):
    """A sequence whose turn it is, of an adapter without a row."""

    sequence: Sequence
    needs_row: bool  # else pages


@dataclass(slots=True)
class _Scan:
    step: Step
    now: float
    is_open: bool  # more sequences can be admitted
    lookahead: int = MAX_LOOKAHEAD
    num_failed: int = 0
    wanted: set[int] = field(default_factory=set)  # slots of earlier turns; later ones keep off


class Admission:
    """Goes through prompts, running and waiting, in turn, once per plan."""

    def __init__(
        self,
        waiting: WaitingQueue,
        running: RunningSet,
        kv: KvPages,
        device: DeviceSlots,
        shares: Shares,
        turns: Turns,
        *,
        chunk_tokens: int,
        max_running: int,
        max_overtakes: int,
    ) -> None:
        """`max_running`: rows an adapter may have, 0 = any number."""
        self._waiting = waiting
        self._running = running
        self._kv = kv
        self._device = device
        self._shares = shares
        self._turns = turns
        self._chunk_tokens = chunk_tokens
        self._max_running = max_running
        self._overtakes = Overtakes(max_overtakes, self._has_place)
        self._claim: Claim | None = None

    def take_claim(self) -> Claim | None:
        """What the last plan found to lack."""
        claim, self._claim = self._claim, None
        return claim

    def fill(self, step: Step, now: float, *, may_start: bool) -> None:
        """Computes chunks of running prompts and starts sequences, while rows, pages and budget
        last; loads adapters ahead.
        """
        scan = _Scan(step, now, may_start)
        first = self._overtakes.exhausted()
        if first is not None:
            self._consider(first, scan)
        num_prompts = sum(sequence.is_prefilling for sequence in self._running)
        for sequence in self._turns.order(now):
            if sequence.is_running:
                num_prompts -= 1
                if step.budget and sequence is not first:
                    self._compute(sequence, step, [])
            elif scan.lookahead > 0 and not self._is_shut():
                if sequence is not first:
                    self._consider(sequence, scan)
            elif not (num_prompts > 0 and step.budget):
                return

    def _is_shut(self) -> bool:
        """Whether a sequence without a slot has been passed often enough."""
        blocked = self._overtakes.exhausted()
        return blocked is not None and not self._has_place(blocked)

    def _consider(self, sequence: Sequence, scan: _Scan) -> None:
        """Loads what a waiting sequence needs; starts it if nothing is missing."""
        if self._max_running and self._running.count(sequence.adapter) >= self._max_running:
            return
        if scan.num_failed < MAX_FAILED_LOADS:
            self._load(sequence, scan)
        slot = self._slot(sequence, scan.wanted)
        if slot is None:
            if not self._has_place(sequence):
                scan.num_failed += 1
                self._overtakes.block(sequence)
        # A sample still on its way, from before a preemption, belongs into its SequenceStart.
        elif scan.is_open and not sequence.num_in_flight:
            self._shares.reach(sequence.adapter)
            scan.is_open = self._start(sequence, slot, scan)
        scan.lookahead -= not scan.is_open

    def _load(self, sequence: Sequence, scan: _Scan) -> None:
        """Begins to load the sequence's adapter if it is not on the device and there is a place."""
        adapter = sequence.adapter
        if adapter is None or self._device.slot_of(adapter):
            return
        if self._device.may_load(adapter, scan.step):
            self._device.load(adapter, scan.step, scan.wanted, scan.now)

    def _has_place(self, sequence: Sequence) -> bool:
        return sequence.adapter is None or self._device.slot_of(sequence.adapter) > 0

    def _slot(self, sequence: Sequence, wanted: set[int]) -> int | None:
        """The sequence's slot if it can run now, else None; it is wanted either way."""
        if sequence.adapter is None:
            return 0
        slot = self._device.ledger.find(sequence.adapter)
        if slot is None:
            return None
        wanted.add(slot.number)
        return slot.number if slot.is_ready else None

    def _start(self, sequence: Sequence, slot: int, scan: _Scan) -> bool:
        """Gives the sequence a row and its first chunk; False if something is missing."""
        if not scan.step.budget:
            return False
        has_row = self._running.has_row
        # Half a page per running sequence, so that who is admitted is not preempted at once.
        if not has_row or not self._kv.admit(sequence, margin=len(self._running) // 2):
            if not self._running.count(sequence.adapter):
                self._claim = Claim(sequence, needs_row=not has_row)
            return False
        self._waiting.start(sequence, scan.now)
        self._running.add(sequence, slot)
        self._overtakes.count(sequence)
        sequence.started_at = sequence.started_at or scan.now
        assert sequence.lease is not None
        scan.step.start(sequence)
        self._compute(sequence, scan.step, sequence.lease.pages)
        return True

    def _compute(self, sequence: Sequence, step: Step, pages: list[int]) -> None:
        """A prompt's next chunk. What a preemption has it compute again is not paid for twice."""
        start = max(sequence.num_planned, sequence.num_paid)
        step.add_chunk(sequence, self._chunk_tokens, pages)
        self._shares.charge(sequence.adapter, max(0, sequence.num_planned - start))
