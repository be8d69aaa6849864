"""QueueLimit: how many requests of one adapter may wait, for its fetch or for a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lorafleet.proto.messages import AdapterKey
from lorafleet.router.errors import Overloaded

MAX_RETRY_SECONDS = 60


class QueueLimit:
    """Refuses requests that would make an adapter's queue too long; the base model has one too."""

    def __init__(
        self,
        limit: int,
        count: Callable[[AdapterKey | None], int],
        waited: Callable[[AdapterKey | None], float],
    ) -> None:
        """`limit` 0 = none. `count` gives the sequences that wait for a row with an adapter,
        `waited` the seconds the oldest of them has.
        """
        self._limit = limit
        self._count = count
        self._waited = waited
        self._fetching: Counter[AdapterKey | None] = Counter()

    @contextmanager
    def enter(self, key: AdapterKey | None) -> Iterator[None]:
        """A request's stay before it is in the queue.

        Raises Overloaded, to be tried again when what waits now should have been served.
        """
        if self._limit and self._count(key) + self._fetching[key] >= self._limit:
            name = f"adapter {key}" if key is not None else "the base model"
            raise Overloaded(
                f"{self._limit} requests wait for {name}, which is the limit of one adapter",
                min(MAX_RETRY_SECONDS, max(1, round(self._waited(key)))),
            )
        self._fetching[key] += 1
        try:
            yield
        finally:
            self._fetching[key] -= 1
            if not self._fetching[key]:
                del self._fetching[key]
