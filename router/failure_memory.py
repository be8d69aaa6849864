"""FailureMemory: which adapters could not be had, by whom, and when asking again makes sense."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil

from lorafleet.cache.merging import recipe
from lorafleet.proto.messages import AdapterKey
from lorafleet.router.callers import Caller, Callers
from lorafleet.router.errors import (
    AdapterChanged,
    AdapterError,
    AdapterForbidden,
    AdapterNotFound,
    AdapterUnservable,
    SourceTimeout,
    SourceUnavailable,
)

_FIRST_SECONDS = 1.0
_MAX_FAILURES = 10_000  # beyond them the one that failed longest ago is forgotten
_PASSING = (SourceUnavailable, SourceTimeout)
_REMEMBERED = (*_PASSING, AdapterNotFound, AdapterForbidden, AdapterUnservable)

_UNREMEMBERED = ("local", recipe.SOURCE)


@dataclass(slots=True)
class _Failure:
    # Not the error itself, whose frames hold its request's body and token.
    kind: type[AdapterError]
    sentence: str
    count: int  # in a row
    failed_at: float
    retry_at: float


class FailureMemory:
    """A failed fetch is not tried again for a second, then two, four, ..., `max_seconds`.

    It is remembered for the adapter's source, id and revision, and for the token it was tried
    with: another token or revision is tried at once. Local directories cost no one anything and
    are not remembered: whoever repairs one expects to have it served. Nor are merges, whose
    members are. Does no I/O.
    """

    def __init__(
        self, max_seconds: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """0 seconds remember nothing; `clock` tells seconds."""
        self._max_seconds, self._clock = max_seconds, clock
        self._failures: OrderedDict[Caller, _Failure] = OrderedDict()  # failed longest ago first
        self._callers = Callers()

    def __len__(self) -> int:
        return len(self._failures)

    def check(self, key: AdapterKey, api_token: str) -> None:
        """Raises the error of the last try, saying so, unless it is time to try again."""
        failure = self._failures.get(self._callers.of(key, api_token))
        now = self._clock()
        if failure is None or now >= failure.retry_at:
            return
        left = ceil(failure.retry_at - now)
        past = now - failure.failed_at
        error = failure.kind(
            f"{failure.sentence} (Remembered: this was found {past:.0f} s ago; it is tried again "
            f"in {left} s.)"
        )
        error.retry_after_seconds = left if isinstance(error, _PASSING) else 0
        raise error

    @contextmanager
    def watch(self, key: AdapterKey, api_token: str) -> Iterator[None]:
        """Remembers the failure of the fetch inside, and tells it when to come again."""
        try:
            yield
        except _REMEMBERED as error:
            self._failed(key, api_token, error)
            raise

    def succeeded(self, key: AdapterKey, api_token: str) -> None:
        """The adapter was had: an earlier failure says nothing any more."""
        if self._failures:
            self._failures.pop(self._callers.of(key, api_token), None)

    def forget(self, key: AdapterKey) -> None:
        """Forgets an adapter's failures, whoever had them."""
        for caller in [caller for caller in self._failures if caller[0] == key]:
            del self._failures[caller]

    def _failed(self, key: AdapterKey, api_token: str, error: AdapterError) -> None:
        if not self._max_seconds or key.source in _UNREMEMBERED:
            return
        if isinstance(error, AdapterChanged):  # the next look is at another content
            return
        now, caller = self._clock(), self._callers.of(key, api_token)
        last = self._failures.pop(caller, None)
        # Who has not asked for long does not ask too often.
        is_in_a_row = last is not None and now < last.retry_at + self._max_seconds
        count = last.count + 1 if last is not None and is_in_a_row else 1
        seconds = min(_FIRST_SECONDS * 2 ** min(count - 1, 32), self._max_seconds)
        self._failures[caller] = _Failure(type(error), str(error), count, now, now + seconds)
        if len(self._failures) > _MAX_FAILURES:
            self._failures.popitem(last=False)
        if isinstance(error, _PASSING):
            error.retry_after_seconds = ceil(seconds)
