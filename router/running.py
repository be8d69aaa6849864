"""RunningSet: sequences with a row, oldest first, and who of them has to yield first."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator

from lorafleet.cache.slots import SlotLedger
from lorafleet.router.adapter import Adapter
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
        self._counts: Counter[Adapter | None] = Counter()
        self._by_standing: list[Sequence] | None = None  # None = not known

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def has_row(self) -> bool:
        """Whether another sequence could get a row."""
        return bool(self._free_rows)

    @property
    def by_standing(self) -> list[Sequence]:
        """Each adapter's oldest, by age, then each one's second oldest, and so on.

        When something runs out, the last of these yields: the youngest of an adapter that holds
        the most rows. The first, which is the oldest of all, never does.
        """
        if self._by_standing is None:
            ranks: list[list[Sequence]] = []
            seen: Counter[Adapter | None] = Counter()
            for sequence in self._sequences:
                if seen[sequence.adapter] == len(ranks):
                    ranks.append([])
                ranks[seen[sequence.adapter]].append(sequence)
                seen[sequence.adapter] += 1
            self._by_standing = [sequence for rank in ranks for sequence in rank]
        return self._by_standing

    def count(self, adapter: Adapter | None) -> int:
        """Rows an adapter has."""
        return self._counts[adapter]

    def spare(self, priority: int) -> Sequence | None:
        """Who yields to an adapter without a row: never an adapter's oldest, nor a better one."""
        beyond_first = self.by_standing[len(self._counts) :]
        worse = (s for s in reversed(beyond_first) if s.request.priority >= priority)
        return next(worse, None)

    def add(self, sequence: Sequence, slot: int) -> None:
        """Gives a row to a sequence that has its pages; `slot` must be ready."""
        self._slots.use(slot)
        sequence.row, sequence.slot = self._free_rows.pop(), slot
        sequence.num_start = len(sequence.tokens)
        sequence.status = Status.RUNNING
        insort(self._sequences, sequence, key=_ticket)
        self._counts[sequence.adapter] += 1
        self._by_standing = None

    def remove(self, sequence: Sequence, status: Status) -> None:
        """Takes back all a sequence holds, at once even when steps in flight still name its row.

        The shard runs plans in order: what those steps write lands before any later plan can give
        the same row, pages or slot to someone else.
        """
        index = bisect_left(self._sequences, sequence.ticket, key=_ticket)
        assert self._sequences[index] is sequence
        del self._sequences[index]
        self._counts[sequence.adapter] -= 1
        if not self._counts[sequence.adapter]:
            del self._counts[sequence.adapter]
        self._by_standing = None
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
        assert self._counts == Counter(sequence.adapter for sequence in self)
        self._slots.check([sequence.slot for sequence in self])
        self._kv.check(self)
