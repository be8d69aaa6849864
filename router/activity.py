"""Activity: what happens to adapters, told once, for the API and for Prometheus."""

from __future__ import annotations

import time

from lorafleet.proto.messages import AdapterKey, Tier
from lorafleet.router.adapter_metrics import AdapterMetrics
from lorafleet.router.usage import Served, UsageBook


class Activity:
    """Each event goes to the adapter's record and to its metrics."""

    def __init__(self, max_adapters: int = 0) -> None:
        """`max_adapters`: how many have metrics of their own."""
        self.usage = UsageBook()
        self.metrics = AdapterMetrics(max_adapters)

    def looked_up(self, key: AdapterKey, tier: Tier) -> None:
        """A request came and found its adapter in `tier`."""
        self.metrics.looked_up(key, tier, time.monotonic())

    def loaded(self, key: AdapterKey, tier: Tier, seconds: float) -> None:
        """A load into `tier` has finished."""
        self.usage.loaded(key, tier, seconds)
        self.metrics.loaded(key, tier, seconds)

    def evicted(self, key: AdapterKey, tier: Tier) -> None:
        """An adapter lost its place in `tier` to another."""
        self.metrics.evicted(key, tier)

    def served(self, key: AdapterKey | None, served: Served) -> None:
        """A request ended; None is the base model."""
        self.metrics.served(key, served)
        if key is not None:
            self.usage.served(key, served, time.time())
