"""/info, /health, /metrics, /tokenize."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lorafleet.router.service import SERVICE
from tests.fakes import FakeConfig
from tests.router.http_service import Running, serving


async def test_info_names_the_model_and_the_limits() -> None:
    async with serving(FakeConfig(max_model_len=100), max_best_of=3) as service:
        info = await (await service.client.get("/info")).json()
    assert (info["model_id"], info["model_dtype"]) == ("fake", "float32")
    assert (info["max_total_tokens"], info["max_input_length"]) == (100, 99)
    assert (info["max_best_of"], info["num_shard"]) == (3, 1)
    assert info["model_sha"] is None


async def test_limits_are_those_of_the_kv_cache_when_it_is_small() -> None:
    async with serving(FakeConfig(num_pages=2, page_size=16)) as service:
        info = await (await service.client.get("/info")).json()
        filled = await service.generate("abc", details=True)
    assert info["max_total_tokens"] == 33
    assert filled["details"]["generated_tokens"] == 30


@pytest.mark.parametrize("path", ["/health", "/"])
async def test_health_is_503_while_draining_and_work_is_refused(path: str) -> None:
    async with serving() as service:
        assert (await service.client.get(path)).status == 200
        app = service.client.app
        assert app is not None
        await app[SERVICE].concurrency.drain()
        response = await service.client.get(path)
        assert response.status == 503
        assert await response.json() == {"error": "unhealthy", "error_type": "healthcheck"}
        refused = await service.json("/generate", {"inputs": "a"}, status=503)
        assert refused["error_type"] == "draining"


async def test_health_is_503_when_the_shards_are_gone() -> None:
    async with serving() as service:
        service.shard.stop()
        await service.engine.failed.wait()
        assert (await service.client.get("/health")).status == 503


async def test_tokenize_says_where_tokens_stand() -> None:
    async with serving() as service:
        tokens = await service.json("/tokenize", {"inputs": "a é"})
        wrong = await service.json(
            "/tokenize", {"inputs": "a", "add_special_tokens": 1}, status=422
        )
    assert [(token["start"], token["stop"]) for token in tokens] == [(0, 1), (1, 2), (2, 3), (2, 3)]
    assert [token["text"] for token in tokens] == ["a", " ", "é", "é"]
    assert tokens[0]["id"] == 3 + ord("a") - 32
    assert wrong["error"].startswith("`add_special_tokens`")


async def test_metrics_count_what_happened() -> None:
    async with serving() as service:
        parameters = {"max_new_tokens": 5, "adapter_id": "adapter-1"}
        await service.generate("hello", **parameters)
        await service.frames("/generate_stream", {"inputs": "hi", "parameters": parameters})
        await service.json("/generate", {}, status=422)
        await service.json("/v1/completions", {"model": "no", "prompt": "a"}, status=404)
        await service.client.get("/nowhere")
        values = await scrape(service)
    assert values["lorafleet_requests_total", "/generate", "200"] == 1
    assert values["lorafleet_requests_total", "/generate_stream", "200"] == 1
    assert values["lorafleet_requests_total", "/generate", "422"] == 1
    assert values["lorafleet_requests_total", "/v1/completions", "404"] == 1
    assert values["lorafleet_requests_total", "unknown", "404"] == 1
    assert values["lorafleet_request_prompt_tokens_sum",] == 7
    assert values["lorafleet_request_generated_tokens_sum",] == 10
    assert values["lorafleet_request_time_to_first_token_seconds_count",] == 2
    assert values["lorafleet_request_inter_token_seconds_count",] == 8
    assert values["lorafleet_request_queue_seconds_count",] == 2
    assert values["lorafleet_request_duration_seconds_count",] == 4
    assert values["lorafleet_sequences_running",] == 0
    assert values["lorafleet_kv_pages_used",] == 0
    assert values["lorafleet_kv_pages_total",] == 4096
    assert values["lorafleet_step_adapters_max",] == 1
    assert values["lorafleet_adapters_loaded", "device"] == 1
    assert values["lorafleet_adapter_evictions_total", "device"] == 0
    assert values["lorafleet_preemptions_total",] == 0
    assert values["lorafleet_steps_total",] >= 10


async def scrape(service: Running) -> dict[tuple[str, ...], float]:
    """Sample values by name and label values, sorted by label name."""
    response = await service.client.get("/metrics")
    assert response.headers["Content-Type"].startswith("text/plain")
    families = text_string_to_metric_families(await response.text())
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in families
        for sample in family.samples
    }
