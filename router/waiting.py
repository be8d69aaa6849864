"""WaitingQueue: sequences without a row, one FIFO for each adapter and priority."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterator, ValuesView
from dataclasses import dataclass, field

from lorafleet.router.adapter import Adapter
from lorafleet.router.sequence import Sequence


@dataclass(eq=False, slots=True)
class Line:
    """Sequences of one adapter and priority, by ticket."""

    adapter: Adapter | None
    priority: int
    served_at: float  # when its last sequence started; before that, when its first one came
    sequences: list[Sequence] = field(default_factory=list)


class WaitingQueue:
    """Each line is ordered by ticket, so a preempted sequence returns to its place in front."""

    def __init__(self) -> None:
        self._lines: dict[tuple[Adapter | None, int], Line] = {}  # none is empty
        self._counts: Counter[Adapter | None] = Counter()

    def __len__(self) -> int:
        return self._counts.total()

    def __iter__(self) -> Iterator[Sequence]:
        for line in self._lines.values():
            yield from line.sequences

    @property
    def lines(self) -> ValuesView[Line]:
        """Every line, in no order."""
        return self._lines.values()

    def count(self, adapter: Adapter | None) -> int:
        """Sequences that wait with this adapter."""
        return self._counts[adapter]

    def oldest(self, adapter: Adapter | None) -> Sequence | None:
        """The one with this adapter that arrived first."""
        heads = (line.sequences[0] for line in self.lines if line.adapter is adapter)
        return min(heads, key=lambda head: head.ticket, default=None)

    def push(self, sequence: Sequence) -> None:
        """Puts a sequence where its ticket belongs."""
        adapter, priority = sequence.adapter, sequence.request.priority
        line = self._lines.get((adapter, priority))
        if line is None:
            line = self._lines[adapter, priority] = Line(adapter, priority, sequence.submitted_at)
        insort(line.sequences, sequence, key=lambda other: other.ticket)
        self._counts[adapter] += 1

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out."""
        adapter, priority = sequence.adapter, sequence.request.priority
        line = self._lines[adapter, priority]
        line.sequences.remove(sequence)
        if not line.sequences:
            del self._lines[adapter, priority]
        self._counts[adapter] -= 1
        if not self._counts[adapter]:
            del self._counts[adapter]

    def start(self, sequence: Sequence, now: float) -> None:
        """Takes out a sequence that got a row."""
        self._lines[sequence.adapter, sequence.request.priority].served_at = now
        self.remove(sequence)
