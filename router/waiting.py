"""WaitingQueue: sequences without a row, one FIFO per adapter under an overall order of arrival."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from lorafleet.router.adapter import Adapter
from lorafleet.router.sequence import Sequence


class WaitingQueue:
    """Each queue is ordered by ticket, so a preempted sequence returns to its place in front."""

    def __init__(self) -> None:
        self._queues: dict[Adapter | None, list[Sequence]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue

    def push(self, sequence: Sequence) -> None:
        """Puts a sequence where its ticket belongs."""
        queue = self._queues.setdefault(sequence.adapter, [])
        insort(queue, sequence, key=lambda other: other.ticket)
        self._size += 1

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out."""
        queue = self._queues[sequence.adapter]
        queue.remove(sequence)
        self._size -= 1
        if not queue:
            del self._queues[sequence.adapter]

    def heads(self) -> Iterator[Sequence]:
        """The first sequence of each queue, oldest first.

        If the caller removes the sequence it was given, the next one of that queue takes its turn;
        otherwise the rest of that queue is passed over.
        """
        heap = [(queue[0].ticket, queue) for queue in self._queues.values()]
        heapify(heap)
        while heap:
            ticket, queue = heappop(heap)
            yield queue[0]
            if queue and queue[0].ticket != ticket:
                heappush(heap, (queue[0].ticket, queue))
