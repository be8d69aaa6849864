"""Admission: which waiting sequences join the running ones, and which adapters to load for them."""

from __future__ import annotations

from lorafleet.router.device import DeviceSlots
from lorafleet.router.kv import KvPages
from lorafleet.router.running import RunningSet
from lorafleet.router.sequence import Sequence
from lorafleet.router.step import Step
from lorafleet.router.waiting import WaitingQueue

# Younger sequences that may be admitted before the oldest one whose adapter finds no slot. Past it,
# nothing younger is admitted or loaded until that one is: running sequences end, copies under way
# finish, so it gets its slot within the time the sequences then running need.
MAX_OVERTAKES = 64

# Queues looked at, for adapters to load ahead, once no more sequences can be admitted.
MAX_LOOKAHEAD = 32

# Adapters found no place for in one scan before it stops looking for places.
MAX_FAILED_LOADS = 8


class Admission:
    """Scans the waiting queues in order of arrival, once per plan."""

    def __init__(
        self,
        waiting: WaitingQueue,
        running: RunningSet,
        kv: KvPages,
        device: DeviceSlots,
        chunk_tokens: int,
        max_overtakes: int = MAX_OVERTAKES,
    ) -> None:
        self._waiting = waiting
        self._running = running
        self._kv = kv
        self._device = device
        self._chunk_tokens = chunk_tokens
        self._max_overtakes = max_overtakes

    def admit(self, step: Step, now: float) -> None:
        """Starts sequences in `step` while rows, pages and budget last; loads adapters ahead."""
        blocked: Sequence | None = None  # the oldest whose adapter finds no place
        wanted: set[int] = set()  # slots of older sequences; younger ones may not evict them
        is_open, lookahead, num_failed = True, MAX_LOOKAHEAD, 0
        for sequence in self._waiting.heads():
            if blocked is not None and blocked.overtaken >= self._max_overtakes:
                return
            if num_failed < MAX_FAILED_LOADS:
                self._load(sequence, step, wanted, now)
            slot = self._slot(sequence, wanted)
            if slot is None:
                if not self._is_loading(sequence):
                    num_failed += 1
                    blocked = blocked or sequence
            elif is_open and self._start(sequence, slot, step, now):
                if blocked is not None:
                    blocked.overtaken += 1
            else:
                is_open = False
            lookahead -= not is_open
            if lookahead == 0:
                return

    def _load(self, sequence: Sequence, step: Step, wanted: set[int], now: float) -> None:
        """Begins to load the sequence's adapter if it is not on the device and there is a place."""
        adapter = sequence.adapter
        if adapter is None or self._device.slot_of(adapter):
            return
        if self._device.may_load(adapter, step):
            self._device.load(adapter, step, wanted, now)

    def _is_loading(self, sequence: Sequence) -> bool:
        return sequence.adapter is not None and self._device.slot_of(sequence.adapter) > 0

    def _slot(self, sequence: Sequence, wanted: set[int]) -> int | None:
        """The sequence's slot if it can run now, else None; it is wanted either way."""
        if sequence.adapter is None:
            return 0
        slot = self._device.ledger.find(sequence.adapter)
        if slot is None:
            return None
        wanted.add(slot.number)
        return slot.number if slot.is_ready else None

    def _start(self, sequence: Sequence, slot: int, step: Step, now: float) -> bool:
        """Gives the sequence a row and its first chunk; False if something is missing."""
        # A sample still on its way, from before a preemption, belongs into its SequenceStart.
        if not self._running.has_row or step.budget == 0 or sequence.num_in_flight:
            return False
        # Half a page per running sequence, so that who is admitted is not preempted at once.
        if not self._kv.admit(sequence, margin=len(self._running) // 2):
            return False
        self._waiting.remove(sequence)
        self._running.add(sequence, slot)
        sequence.started_at = sequence.started_at or now
        step.start(sequence, self._chunk_tokens)
        return True
