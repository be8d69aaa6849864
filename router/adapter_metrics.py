"""AdapterMetrics: Prometheus's view of what happens to adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from prometheus_client import Counter, Histogram, Summary
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from lorafleet.proto.messages import AdapterKey, Tier
from lorafleet.router.adapter_labels import AdapterLabels, Label
from lorafleet.router.prompt import BASE_MODEL
from lorafleet.router.usage import Served

_LABELS = ("adapter", "source")
# Few, because there is one series of each bucket and adapter.
_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)
_BASE = Label(BASE_MODEL, "")


class AdapterMetrics(Collector):
    """Register it. Labels are bounded by AdapterLabels, whatever requests name."""

    def __init__(self, max_adapters: int) -> None:
        self.labels = AdapterLabels(max_adapters, self._remove)
        self._requests = _counter("requests", "Requests that reached the queue and ended.")
        self._prompt_tokens = _counter("prompt_tokens", "Prompt tokens of those requests.")
        self._generated_tokens = _counter("generated_tokens", "Tokens generated for them.")
        self._first_token = _seconds("time_to_first_token", "From arrival to the first token.")
        self._queue = _seconds("queue", "From submission, adapter fetch included, to a step.")
        self._lookups = _counter(
            "hits",
            "Requests by the tier that held their adapter when they came (none: not loaded).",
            "tier",
        )
        self._evictions = _counter("tier_evictions", "Times it made room in a tier.", "tier")
        self._loads = Summary(
            "lorafleet_adapter_load_seconds",
            "Loading into a tier: disk from its source, host from disk, device from host.",
            (*_LABELS, "tier"),
            registry=None,
        )

    def looked_up(self, key: AdapterKey, tier: Tier, now: float) -> None:
        """A request came and found its adapter in `tier`; `now` is monotonic seconds."""
        self._lookups.labels(*self.labels.note(key, now), _name(tier)).inc()

    def loaded(self, key: AdapterKey, tier: Tier, seconds: float) -> None:
        """A load into a tier took so long."""
        self._loads.labels(*self.labels.claim(key), _name(tier)).observe(seconds)

    def evicted(self, key: AdapterKey, tier: Tier) -> None:
        """An adapter lost its place in a tier to another."""
        self._evictions.labels(*self.labels.find(key), _name(tier)).inc()

    def served(self, key: AdapterKey | None, served: Served) -> None:
        """A request ended; None is the base model."""
        label = _BASE if key is None else self.labels.find(key)
        self._requests.labels(*label).inc()
        self._prompt_tokens.labels(*label).inc(served.prompt_tokens)
        self._generated_tokens.labels(*label).inc(served.generated_tokens)
        self._queue.labels(*label).observe(served.queue_seconds)
        if served.first_token_seconds is not None:
            self._first_token.labels(*label).observe(served.first_token_seconds)

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every series there is."""
        for metric in self._plain:
            yield from metric.collect()
        for by_tier in self._by_tier:
            yield from by_tier.collect()

    @property
    def _plain(self) -> tuple[Counter | Histogram, ...]:
        return (
            self._requests, self._prompt_tokens, self._generated_tokens, self._first_token,
            self._queue,
        )  # fmt: skip

    @property
    def _by_tier(self) -> tuple[Counter | Summary, ...]:
        return (self._lookups, self._evictions, self._loads)

    def _remove(self, label: Label) -> None:
        for metric in self._plain:
            _forget(metric.remove, *label)
        for by_tier in self._by_tier:
            for tier in Tier:
                _forget(by_tier.remove, *label, _name(tier))


def _counter(name: str, help: str, *labels: str) -> Counter:
    return Counter(f"lorafleet_adapter_{name}", help, (*_LABELS, *labels), registry=None)


def _seconds(name: str, help: str) -> Histogram:
    full_name = f"lorafleet_adapter_{name}_seconds"
    return Histogram(full_name, help, _LABELS, buckets=_SECONDS, registry=None)


def _forget(remove: Callable[..., None], *values: str) -> None:
    with suppress(KeyError):  # nothing was counted there
        remove(*values)


def _name(tier: Tier) -> str:
    return tier.name.lower()
