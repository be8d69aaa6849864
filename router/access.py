"""AccessMemory: who was found, a short time ago, to have access to which adapter."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lorafleet.proto.messages import AdapterKey
from lorafleet.router.callers import Caller, Callers
from lorafleet.router.errors import AdapterForbidden, AdapterNotFound

_MAX_GRANTS = 10_000  # beyond them the oldest one is forgotten


class AccessMemory:
    """A source's word that a token may read an adapter holds for `seconds` after it was asked for.

    A token that is taken back works until then, and no longer. Refusals are FailureMemory's.
    Does no I/O.
    """

    def __init__(self, seconds: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        """0 seconds remember nothing; `clock` tells seconds."""
        self._seconds, self._clock = seconds, clock
        self._asked_at: OrderedDict[Caller, float] = OrderedDict()  # granted longest ago first
        self._callers = Callers()

    def __len__(self) -> int:
        return len(self._asked_at)

    def allows(self, key: AdapterKey, api_token: str) -> bool:
        """Whether the source need not be asked again; False says nothing about access."""
        asked_at = self._asked_at.get(self._callers.of(key, api_token))
        return asked_at is not None and self._clock() < asked_at + self._seconds

    @contextmanager
    def watch(self, key: AdapterKey, api_token: str) -> Iterator[None]:
        """Remembers what the source says inside; time counts from the question."""
        caller, asked_at = self._callers.of(key, api_token), self._clock()
        try:
            yield
        except (AdapterForbidden, AdapterNotFound):
            self._asked_at.pop(caller, None)
            raise
        self._asked_at.pop(caller, None)
        self._asked_at[caller] = asked_at
        if len(self._asked_at) > _MAX_GRANTS:
            self._asked_at.popitem(last=False)

    def forget(self, key: AdapterKey) -> None:
        """Forgets who had access to an adapter."""
        for caller in [caller for caller in self._asked_at if caller[0] == key]:
            del self._asked_at[caller]
