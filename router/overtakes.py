"""Overtakes: for how long a sequence whose adapter finds no slot is passed over."""

from __future__ import annotations

from collections.abc import Callable

from lorafleet.router.sequence import Sequence, Status


class Overtakes:
    """Follows one such sequence at a time, the first that was found, and counts who passes it."""

    def __init__(self, limit: int, has_place: Callable[[Sequence], bool]) -> None:
        """`has_place`: whether the sequence's adapter has a slot, ready or not."""
        self._limit = limit
        self._has_place = has_place
        self._blocked: Sequence | None = None

    def exhausted(self) -> Sequence | None:
        """The sequence that nobody may pass any more, until it has a row."""
        blocked = self._blocked
        if blocked is None:
            return None
        is_exhausted = blocked.overtaken >= self._limit
        is_over = self._has_place(blocked) and not is_exhausted
        if blocked.status is not Status.WAITING or is_over:
            self._blocked = None
            return None
        return blocked if is_exhausted else None

    def block(self, sequence: Sequence) -> None:
        """A sequence's turn came and its adapter found no place."""
        if self._blocked is None:
            self._blocked = sequence

    def count(self, sequence: Sequence) -> None:
        """Another sequence has started."""
        blocked = self._blocked
        if blocked is not None and blocked is not sequence and not self._has_place(blocked):
            blocked.overtaken += 1
