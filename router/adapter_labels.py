"""AdapterLabels: which adapters have metrics of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from lorafleet.proto.messages import AdapterKey

RANK_SECONDS = 60.0  # between two looks at who is busiest


class Label(NamedTuple):
    """The values of the labels `adapter` and `source`."""

    adapter: str
    source: str


OTHER = Label("other", "")


class AdapterLabels:
    """At most `limit` adapters at a time, the busiest; whatever the others do counts as OTHER.

    An adapter gets a free label at once. When none is free, newcomers that are busier than an
    owner take its place at the next look. `on_removed` then hears of the label that went, so that
    its series end: every series only grows while it is there, and none is ever split afterwards.
    """

    def __init__(self, limit: int, on_removed: Callable[[Label], None]) -> None:
        self._limit = limit
        self._on_removed = on_removed
        self._owners: dict[AdapterKey, Label] = {}
        self._events = Counter[AdapterKey]()  # halved at every look, so that the past fades
        self._ranked_at = 0.0

    def find(self, key: AdapterKey) -> Label:
        """Where to count what happens to an adapter."""
        return self._owners.get(key, OTHER)

    def claim(self, key: AdapterKey) -> Label:
        """The same, for something new that happens to it: a label of its own if one is free."""
        if key not in self._owners and len(self._owners) < self._limit:
            self._owners[key] = Label(str(key), key.source)
        return self.find(key)

    def note(self, key: AdapterKey, now: float) -> Label:
        """The same for a request, which tells how busy it is; `now` is monotonic seconds."""
        self._events[key] += 1
        if now - self._ranked_at >= RANK_SECONDS:
            self._ranked_at = now
            self._rank()
        return self.claim(key)

    def _rank(self) -> None:
        def rank(key: AdapterKey) -> tuple[int, bool]:
            return self._events[key], key in self._owners  # on a tie the owner stays

        candidates = {**dict.fromkeys(self._events), **self._owners}
        busiest = sorted(candidates, key=rank, reverse=True)[: self._limit]
        for key in self._owners.keys() - set(busiest):
            self._on_removed(self._owners.pop(key))
        for key in busiest:
            self.claim(key)
        self._events = Counter({key: n // 2 for key, n in self._events.items() if n > 1})
