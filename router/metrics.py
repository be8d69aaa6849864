"""Every metric of the router, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorafleet.router.adapter_gauges import adapter_gauges
from lorafleet.router.adapter_labels import AdapterLabels
from lorafleet.router.adapter_metrics import AdapterMetrics
from lorafleet.router.stats import EngineStats

_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    30,
    60,
    120,
    300,
)
_TOKEN_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.015,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
)
_TOKENS = tuple(2**power for power in range(18))


class Metrics:
    """What requests do, counted as they do it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "lorafleet_requests",
            "Requests answered, by route and HTTP status (499: the client left).",
            ("route", "status"),
            registry=self.registry,
        )
        self.duration = self._seconds("duration", "From arrival to the last byte.")
        self.queue = self._seconds("queue", "From submission to the first planned step.")
        self.first_token = self._seconds("time_to_first_token", "From arrival to the first token.")
        self.inter_token = self._seconds(
            "inter_token", "Between two tokens of a sequence.", _TOKEN_SECONDS
        )
        self.prompt_tokens = self._tokens("prompt_tokens", "Tokens of a request's prompts.")
        self.generated_tokens = self._tokens("generated_tokens", "Tokens generated for a request.")

    def watch(self, stats: Callable[[], EngineStats], adapters: AdapterMetrics) -> None:
        """Adds the engine's own numbers, read when someone looks, and those of each adapter."""
        self.registry.register(_EngineCollector(stats, adapters.labels))
        self.registry.register(adapters)

    def exposition(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self.registry)

    def _seconds(self, name: str, help: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        full_name = f"lorafleet_request_{name}_seconds"
        return Histogram(full_name, help, buckets=buckets, registry=self.registry)

    def _tokens(self, name: str, help: str) -> Histogram:
        full_name = f"lorafleet_request_{name}"
        return Histogram(full_name, help, buckets=_TOKENS, registry=self.registry)


class _EngineCollector(Collector):
    """Reads the engine when scraped, so nothing is counted twice."""

    def __init__(self, stats: Callable[[], EngineStats], labels: AdapterLabels) -> None:
        self._stats = stats
        self._labels = labels

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: registering must not read an engine that is still starting."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The engine's gauges and counters now."""
        stats = self._stats()
        yield _gauge("sequences_running", "Sequences with a row.", stats.running)
        yield _gauge("sequences_waiting", "Sequences waiting for a row.", stats.waiting)
        yield _gauge("kv_pages_used", "KV pages sequences hold.", stats.used_pages)
        total = stats.used_pages + stats.free_pages
        yield _gauge("kv_pages_total", "KV pages there are.", total)
        yield _gauge(
            "kv_pages_cached", "Free KV pages that still hold a prefix.", stats.cached_pages
        )
        yield _gauge(
            "step_adapters_max",
            "Most adapters in one of the last steps.",
            stats.max_adapters_in_step,
        )
        yield _counter("steps", "Steps sent to the shards.", stats.num_steps)
        yield _counter(
            "preemptions", "Sequences set back for want of pages.", stats.num_preemptions
        )
        yield _counter(
            "prefix_query_tokens", "Prompt tokens looked up.", stats.num_prefix_query_tokens
        )
        yield _counter(
            "prefix_hit_tokens",
            "Prompt tokens found in the prefix cache.",
            stats.num_prefix_hit_tokens,
        )
        yield from adapter_gauges(stats, self._labels)


def _gauge(name: str, help: str, value: float) -> Metric:
    return GaugeMetricFamily(f"lorafleet_{name}", help, value)


def _counter(name: str, help: str, value: float) -> Metric:
    return CounterMetricFamily(f"lorafleet_{name}", help, value)
