"""ByteLedger: which adapters a tier holds, and how many bytes they take."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class ByteLedger(Generic[K]):
    """Holdings of a tier with a byte budget, least recently used first."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = 0
        self.num_evictions = 0  # counted by whoever evicts
        self._held: OrderedDict[K, int] = OrderedDict()

    def __contains__(self, key: K) -> bool:
        return key in self._held

    def __len__(self) -> int:
        return len(self._held)

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

    def remove(self, key: K) -> None:
        """Holds nothing for a key any more."""
        self.used -= self._held.pop(key, 0)

    def touch(self, key: K) -> None:
        """A key was used now; nothing if it is not held."""
        if key in self._held:
            self._held.move_to_end(key)

    def oldest(self, is_pinned: Callable[[K], bool]) -> K | None:
        """The least recently used key that is not pinned."""
        return next((key for key in self._held if not is_pinned(key)), None)

    def check(self) -> None:
        """Asserts that the total is the sum."""
        assert self.used == sum(self._held.values()), "bytes are lost"
