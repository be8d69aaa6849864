"""Metrics of each adapter, and the bound on their labels."""

from __future__ import annotations

from lorafleet.proto.messages import AdapterKey
from lorafleet.router.adapter_labels import OTHER, RANK_SECONDS, AdapterLabels, Label
from tests.fakes import FakeConfig
from tests.router.http_service import serving
from tests.router.test_http_service import scrape


def key(name: str) -> AdapterKey:
    return AdapterKey("hub", name, "v1")


def test_a_busier_newcomer_takes_the_label_of_the_least_busy_at_the_next_look() -> None:
    removed: list[Label] = []
    labels = AdapterLabels(2, removed.append)
    now = RANK_SECONDS
    for name in ("a", "a", "b"):
        labels.note(key(name), now)
    assert labels.find(key("a")) == Label("a@v1", "hub")
    for _ in range(3):
        assert labels.note(key("c"), now) == OTHER
    assert labels.note(key("c"), 2 * now) == Label("c@v1", "hub")
    assert removed == [Label("b@v1", "hub")]
    assert labels.note(key("b"), 2 * now) == OTHER


def test_on_a_tie_and_without_a_rival_owners_stay() -> None:
    removed: list[Label] = []
    labels = AdapterLabels(2, removed.append)
    labels.claim(key("quiet"))
    for minute in range(1, 9):
        labels.note(key("a"), minute * RANK_SECONDS)
    assert labels.find(key("quiet")) != OTHER
    labels.note(key("b"), 8 * RANK_SECONDS)
    assert labels.find(key("a")) != OTHER
    assert labels.find(key("b")) == OTHER
    assert removed == []


async def test_what_an_adapter_does_is_counted_under_its_name() -> None:
    config = FakeConfig(echo=True, host_bytes=2 * 4096)
    async with serving(config) as service:
        for name in ("adapter-0", "adapter-0", "adapter-3", "adapter-6"):
            await service.generate("ab", adapter_id=name, max_new_tokens=4)
        await service.generate("ab", max_new_tokens=1)
        values = await scrape(service)
    first = ("adapter-0", "local")
    assert values["lorafleet_adapter_requests_total", *first] == 2
    assert values["lorafleet_adapter_generated_tokens_total", *first] == 8
    assert values["lorafleet_adapter_prompt_tokens_total", *first] == 4
    assert values["lorafleet_adapter_hits_total", *first, "none"] == 1
    assert values["lorafleet_adapter_hits_total", *first, "device"] == 1
    assert values["lorafleet_adapter_tier_evictions_total", *first, "host"] == 1
    assert values["lorafleet_adapter_time_to_first_token_seconds_count", *first] == 2
    assert values["lorafleet_adapter_queue_seconds_count", *first] == 2
    for tier in ("disk", "host", "device"):
        assert values["lorafleet_adapter_load_seconds_count", *first, tier] == 1
    assert values["lorafleet_adapter_bytes", "adapter-6", "local", "device"] == 4096
    assert values["lorafleet_adapter_tier_bytes", "host"] == 2 * 4096
    assert values["lorafleet_adapter_tier_budget_bytes", "host"] == 2 * 4096
    assert values["lorafleet_adapter_requests_total", "__base_model__", ""] == 1


async def test_labels_are_no_more_than_the_flag_allows_whatever_is_asked_for() -> None:
    async with serving(FakeConfig(echo=True), metrics_max_adapters=2) as service:
        for name in range(6):
            await service.generate("a", adapter_id=f"adapter-{name}", max_new_tokens=1)
            missing = {"inputs": "a", "parameters": {"adapter_id": f"nobody-{name}"}}
            await service.json("/generate", missing, status=404)
        values = await scrape(service)
    adapters = {labels[1] for labels in values if labels[0] == "lorafleet_adapter_requests_total"}
    assert adapters == {"adapter-0", "adapter-1", "other"}
    assert values["lorafleet_adapter_requests_total", "other", ""] == 4
