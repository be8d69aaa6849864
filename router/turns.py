"""Turns: the order in which prompts, running and waiting, get a step's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from lorafleet.router.adapter import Adapter
from lorafleet.router.running import RunningSet
from lorafleet.router.sequence import Sequence
from lorafleet.router.shares import Shares
from lorafleet.router.waiting import Line, WaitingQueue

AGEING_SECONDS = 10.0

Key = tuple[int, int, int, int]


class Turns:
    """By level, then round, then fewest rows of the adapter, then arrival; the least goes first.

    A line's level is its priority, less one for each `ageing_seconds` in which none of it started,
    but never before the best priority that waits. So a low priority gets its turn in the end, and
    then one sequence at a time. What runs already has the best level.
    """

    def __init__(
        self, waiting: WaitingQueue, running: RunningSet, shares: Shares, ageing_seconds: float
    ) -> None:
        self._waiting = waiting
        self._running = running
        self._shares = shares
        self._ageing_seconds = ageing_seconds

    def order(self, now: float) -> Iterator[Sequence]:
        """Running sequences with a prompt left to compute, and heads of lines.

        If the caller takes the head it was given out of its line, the next one gets its turn;
        otherwise the rest of that line is passed over.
        """
        best = min([line.priority for line in self._waiting.lines], default=0)
        candidates = [(best, prompts) for prompts in self._prompts().values()]
        candidates += [
            (self._level(line, best, now), line.sequences) for line in self._waiting.lines
        ]
        # No two keys are equal: a ticket is in one list only.
        heap = [
            (self._key(sequences[0], level), level, sequences) for level, sequences in candidates
        ]
        heapify(heap)
        while heap:
            key, level, sequences = heappop(heap)
            if not sequences:
                continue
            # Its adapter may have been given tokens since the key was made.
            if (current := self._key(sequences[0], level)) > key:
                heappush(heap, (current, level, sequences))
                continue
            sequence = sequences[0]
            is_running = sequence.is_running
            yield sequence
            if is_running:
                del sequences[0]
            if sequences and sequences[0] is not sequence:
                heappush(heap, (self._key(sequences[0], level), level, sequences))

    def _key(self, sequence: Sequence, level: int) -> Key:
        adapter = sequence.adapter
        # As if without a row: within its round a prompt that has begun is computed to its end.
        num_rows = 0 if sequence.is_running else self._running.count(adapter)
        return level, self._shares.round_of(adapter), num_rows, sequence.ticket

    def _level(self, line: Line, best: int, now: float) -> int:
        if line.priority == best:
            return best
        return max(best, line.priority - int((now - line.served_at) / self._ageing_seconds))

    def _prompts(self) -> dict[Adapter | None, list[Sequence]]:
        prompts: dict[Adapter | None, list[Sequence]] = {}
        for sequence in self._running:
            if sequence.is_prefilling:
                prompts.setdefault(sequence.adapter, []).append(sequence)
        return prompts
