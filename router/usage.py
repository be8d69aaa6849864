"""UsageBook: what each adapter has been used for."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from lorafleet.proto.messages import AdapterKey, Tier

MAX_RECORDS = 20_000  # adapters remembered; those not used for longest are forgotten


@dataclass(frozen=True, slots=True)
class Served:
    """One HTTP request's work, when it is over; `first_token_seconds` is None if none came."""

    prompt_tokens: int
    generated_tokens: int
    queue_seconds: float
    first_token_seconds: float | None


@dataclass(slots=True)
class Usage:
    """One adapter's. Counts are since the start, or since the adapter was last forgotten."""

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    last_used_at: float = 0.0  # seconds since the epoch, 0 = never
    load_seconds: dict[Tier, float] = field(default_factory=dict)  # the last load into each tier


class UsageBook:
    """Owns the records; a record is made by the first thing that is noted."""

    def __init__(self, max_records: int = MAX_RECORDS) -> None:
        self._max_records = max_records
        self._records: OrderedDict[AdapterKey, Usage] = OrderedDict()

    def of(self, key: AdapterKey) -> Usage:
        """The adapter's record, empty if nothing was noted."""
        return self._records.get(key) or Usage()

    def loaded(self, key: AdapterKey, tier: Tier, seconds: float) -> None:
        """A load into a tier took so long."""
        self._record(key).load_seconds[tier] = seconds

    def served(self, key: AdapterKey, served: Served, now: float) -> None:
        """A request ended at `now`, in seconds since the epoch."""
        record = self._record(key)
        record.requests += 1
        record.prompt_tokens += served.prompt_tokens
        record.generated_tokens += served.generated_tokens
        record.last_used_at = now

    def _record(self, key: AdapterKey) -> Usage:
        record = self._records.setdefault(key, Usage())
        self._records.move_to_end(key)
        if len(self._records) > self._max_records:
            self._records.popitem(last=False)
        return record
