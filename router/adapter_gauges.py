"""Where adapters are and what they take, as Prometheus sees it when it looks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from lorafleet.proto.messages import Tier
from lorafleet.router.adapter import AdapterStatus
from lorafleet.router.adapter_labels import AdapterLabels, Label
from lorafleet.router.stats import EngineStats

_TIERS = (Tier.DISK, Tier.HOST, Tier.DEVICE)


def adapter_gauges(stats: EngineStats, labels: AdapterLabels) -> Iterator[Metric]:
    """Adapters, bytes and evictions of each tier; bytes of each adapter that has a label."""
    held = Counter(status.tier for status in stats.adapters)
    loaded = _gauge("adapters_loaded", "Adapters by the highest tier that holds them.")
    used = _gauge("adapter_tier_bytes", "Bytes of adapters in a tier, on each shard.")
    budget = _gauge("adapter_tier_budget_bytes", "Bytes a tier may take, on each shard.")
    evictions = CounterMetricFamily(
        "lorafleet_adapter_evictions", "Adapters dropped from a tier to make room.", labels=["tier"]
    )
    for tier in _TIERS:
        name, numbers = [tier.name.lower()], stats.tiers[tier]
        loaded.add_metric(name, held[tier])
        used.add_metric(name, numbers.used_bytes)
        budget.add_metric(name, numbers.budget_bytes)
        evictions.add_metric(name, numbers.num_evictions)
    yield from (loaded, used, budget, evictions, _bytes(stats.adapters, labels))


def _bytes(statuses: list[AdapterStatus], labels: AdapterLabels) -> Metric:
    sums = Counter[tuple[Label, Tier]]()
    for status in statuses:
        for tier, nbytes in _sizes(status):
            sums[labels.find(status.key), tier] += nbytes
    family = GaugeMetricFamily(
        "lorafleet_adapter_bytes",
        "Bytes of an adapter in a tier, on each shard.",
        labels=["adapter", "source", "tier"],
    )
    for (label, tier), nbytes in sums.items():
        family.add_metric([*label, tier.name.lower()], nbytes)
    return family


def _sizes(status: AdapterStatus) -> Iterator[tuple[Tier, int]]:
    """An adapter on the device has its host copy as well."""
    if status.info.disk_bytes:
        yield Tier.DISK, status.info.disk_bytes
    for tier in (Tier.HOST, Tier.DEVICE):
        if status.tier >= tier:
            yield tier, status.info.packed_bytes


def _gauge(name: str, help: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"lorafleet_{name}", help, labels=["tier"])
