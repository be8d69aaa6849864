"""RunningSet: sequences with a row, oldest first."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from lorafleet.cache.slots import SlotLedger
from lorafleet.router.kv import KvPages
from lorafleet.router.sequence import Sequence, Status


def _ticket(sequence: Sequence) -> int:
    return sequence.ticket


class RunningSet:
    """Who holds which row; the one place where a row, its slot and its pages are given back."""

    def __init__(self, max_rows: int, kv: KvPages, slots: SlotLedger) -> None:
        self._max_rows = max_rows
        self._free_rows = list(range(max_rows - 1, -1, -1))
        self._kv = kv
        self._slots = slots
        self._sequences: list[Sequence] = []  # by ticket

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def has_row(self) -> bool:
        """Whether another sequence could get a row."""
        return bool(self._free_rows)

    @property
    def youngest(self) -> Sequence:
        """The last to have arrived."""
        return self._sequences[-1]

    def add(self, sequence: Sequence, slot: int) -> None:
        """Gives a row to a sequence that has its pages; `slot` must be ready."""
        self._slots.use(slot)
        sequence.row, sequence.slot = self._free_rows.pop(), slot
        sequence.num_start = len(sequence.tokens)
        sequence.status = Status.RUNNING
        insort(self._sequences, sequence, key=_ticket)

    def remove(self, sequence: Sequence, status: Status) -> None:
        """Takes back all a sequence holds, at once even when steps in flight still name its row.

        The shard runs plans in order: what those steps write lands before any later plan can give
        the same row, pages or slot to someone else.
        """
        index = bisect_left(self._sequences, sequence.ticket, key=_ticket)
        assert self._sequences[index] is sequence
        del self._sequences[index]
        self._slots.release(sequence.slot)
        self._kv.release(sequence)
        self._free_rows.append(sequence.row)
        sequence.row, sequence.slot = -1, 0
        sequence.num_planned = sequence.num_indexed = 0
        sequence.status = status

    def check(self) -> None:
        """Asserts that rows, slots and pages are held by exactly these sequences."""
        rows = sorted([*self._free_rows, *(sequence.row for sequence in self)])
        assert rows == list(range(self._max_rows)), "rows are lost"
        self._slots.check([sequence.slot for sequence in self])
        self._kv.check(self)
