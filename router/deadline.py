"""Deadline: when a request must be done."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from lorafleet.router.config import RouterConfig
from lorafleet.router.errors import DeadlineExceeded
from lorafleet.router.fields import Fields

MAX_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment of `time.monotonic()`, which is also the event loop's clock."""

    seconds: float  # what the request was given
    at: float  # inf = never

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """`seconds` from now."""
        return cls(seconds, time.monotonic() + seconds)

    @property
    def when(self) -> float | None:
        """As `asyncio.timeout_at` takes it; None = never."""
        return None if math.isinf(self.at) else self.at

    def error(self) -> DeadlineExceeded:
        """What a request that did not make it hears."""
        return DeadlineExceeded(f"the request was not done within its {self.seconds:g} s")


NEVER = Deadline(math.inf, math.inf)


def read_deadline(fields: Fields, config: RouterConfig) -> Deadline:
    """From `timeout`, in seconds, at most --request-timeout, which is also the default.

    Raises InvalidRequest with the range.
    """
    limit = config.request_timeout or MAX_SECONDS
    seconds = fields.number("timeout", config.request_timeout, 0, limit, above_low=True)
    return Deadline.after(seconds) if seconds else NEVER
