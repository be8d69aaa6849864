"""Pace: how much of the cores fetches take while steps are computed on them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

SHARE = 0.03  # of one core, all fetches together
FREE_SECONDS = 0.05  # of CPU that each fetch has first: small adapters come as fast as they can
STEP_SECONDS = 1.0  # since the last step: then nobody waits for a next one
_NAP_SECONDS = 0.05  # after which a sleeping fetch looks whether steps still run


class Pace:
    """Spreads the work of large fetches over many steps. One for all threads, a thread a fetch.

    A step that every core computes is as late as the latest of them, so what a fetch takes of one
    core at once is a gap in every stream; the same in small pieces is lost in a step's own time.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.thread_time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`cpu_clock`: seconds the calling thread has computed since it began."""
        self._clock, self._cpu_clock, self._sleep = clock, cpu_clock, sleep
        self._last_step = float("-inf")
        self._lock = threading.Lock()  # guards _free_at
        self._free_at = float("-inf")  # when all that was used is within the share
        self._thread = threading.local()  # charged: seconds of its CPU that _free_at knows

    def step(self) -> None:
        """A step is about to be computed on the cores of this process."""
        self._last_step = self._clock()

    def rest(self) -> None:
        """Between two pieces of a fetch, on its thread: sleeps while it is ahead of its share."""
        until = self._charge()
        while self._is_stepping() and (left := until - self._clock()) > 0:
            self._sleep(min(left, _NAP_SECONDS))

    def _charge(self) -> float:
        before = getattr(self._thread, "charged", FREE_SECONDS)
        self._thread.charged = max(before, self._cpu_clock())
        used = self._thread.charged - before
        with self._lock:
            self._free_at = max(self._free_at, self._clock()) + used / SHARE
            return self._free_at

    def _is_stepping(self) -> bool:
        return self._clock() - self._last_step < STEP_SECONDS
