"""ByteLedger: which adapters a tier holds, and how many bytes they take."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class ByteLedger(Generic[K]):
    """Holdings of a tier with a byte budget, least recently used first."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = 0
        self.num_evictions = 0  # counted by whoever evicts
        self._held: OrderedDict[K, int] = OrderedDict()
        self._kept: set[K] = set()
        self._kept_bytes = 0

    def __contains__(self, key: K) -> bool:
        return key in self._held

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[K]:
        return iter(self._held)

    @property
    def room(self) -> int:
        """Bytes there are once everything that may be evicted is gone."""
        return self.budget - self._kept_bytes

    def keep(self, key: K) -> None:
        """A key is not evicted until `unkeep`; it stays kept while it is replaced or away."""
        if key not in self._kept:
            self._kept.add(key)
            self._kept_bytes += self.nbytes(key)

    def unkeep(self, key: K) -> None:
        """A key may be evicted again; nothing if it was not kept."""
        if key in self._kept:
            self._kept.remove(key)
            self._kept_bytes -= self.nbytes(key)

    def is_kept(self, key: K) -> bool:
        """Whether `keep` holds."""
        return key in self._kept

    def nbytes(self, key: K) -> int:
        """Bytes held for a key, 0 for none."""
        return self._held.get(key, 0)

    def put(self, key: K, nbytes: int) -> None:
        """Holds `nbytes` for a key, as the most recently used; replaces what it held before.

        May exceed the budget: the caller makes room, before (memory) or after (a download whose
        size was not known).
        """
        self.remove(key)
        self._held[key] = nbytes
        self.used += nbytes
        if key in self._kept:
            self._kept_bytes += nbytes

    def remove(self, key: K) -> None:
        """Holds nothing for a key any more."""
        nbytes = self._held.pop(key, 0)
        self.used -= nbytes
        if key in self._kept:
            self._kept_bytes -= nbytes

    def touch(self, key: K) -> None:
        """A key was used now; nothing if it is not held."""
        if key in self._held:
            self._held.move_to_end(key)

    def oldest(self, is_pinned: Callable[[K], bool]) -> K | None:
        """The least recently used key that is neither kept nor pinned."""
        return next(
            (key for key in self._held if key not in self._kept and not is_pinned(key)), None
        )

    def check(self) -> None:
        """Asserts that the total is the sum."""
        assert self.used == sum(self._held.values()), "bytes are lost"
        assert self._kept_bytes == sum(map(self.nbytes, self._kept)), "kept bytes are lost"
