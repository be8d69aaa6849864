"""What happens at the edges: bad bodies, full service, clients that leave, shards that die."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import pytest
from aiohttp import ClientResponse

from lorafleet.router.service import SERVICE
from tests.fake_model import FIRST_TEXT_ID
from tests.fakes import FakeConfig
from tests.router.http_service import Running, parse_frames, sent, serving, until

BODY = {"inputs": "hello", "parameters": {"max_new_tokens": 1000}}
CHAT = {"model": "", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1000}
STREAMS = [
    ("/generate_stream", BODY),
    ("/v1/chat/completions", CHAT | {"stream": True}),
    ("/v1/completions", {"model": "", "prompt": ["a", "b"], "max_tokens": 1000, "stream": True}),
]


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/tokenize"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"inputs": NaN}',
        b'{"inputs": -Infinity}',
        b"[" * 100_000,
        b"1" * 5000,
    ],
)
async def test_what_is_not_json_is_400(path: str, body: bytes) -> None:
    async with serving() as service:
        response = await service.client.post(path, data=body)
        answer = await response.json()
    assert response.status == 400, answer
    said = answer["error"]["message"] if path.startswith("/v1/") else answer["error"]
    assert said.startswith("the body is not JSON")
    assert path.startswith("/v1/") or answer["error_type"] == "malformed"


async def test_an_infinite_number_is_out_of_range() -> None:
    async with serving() as service:
        body = b'{"inputs": "a", "parameters": {"temperature": 1e999}}'
        response = await service.client.post("/generate", data=body)
        answer = await response.json()
    assert response.status == 422
    assert answer["error"] == "`temperature` must be a number between 0 and 100, got inf"


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
async def test_a_body_over_two_megabytes_is_413(path: str) -> None:
    async with serving() as service:
        body = io.BytesIO(json.dumps({"inputs": "a" * 2**21}).encode())
        response = await service.client.post(path, data=body)
        answer = await response.json()
    assert response.status == 413
    said = answer["error"] if path == "/generate" else answer["error"]["message"]
    assert "too large" in str(said)


async def test_unknown_routes_and_methods_have_the_error_shape() -> None:
    async with serving() as service:
        unknown = await service.json("/nothing", {}, status=404)
        response = await service.client.get("/generate")
        answer = await response.json()
    assert unknown == {"error": "404 Not Found", "error_type": "not_found"}
    assert (response.status, response.headers["Allow"]) == (405, "POST")
    assert answer["error_type"] == "method_not_allowed"


async def test_requests_over_the_limit_get_429() -> None:
    async with serving(max_concurrent_requests=2) as service:
        service.shard.steps.close()
        held = [asyncio.create_task(service.post("/generate", BODY)) for _ in range(2)]
        # The second may find both steps in flight taken by the first, and wait.
        await until(lambda: in_service(service) == 2)
        for path, body in (("/generate", BODY), *STREAMS):
            response = await service.post(path, body)
            answer = await response.json()
            assert response.status == 429
            assert int(response.headers["Retry-After"]) >= 1
            if path.startswith("/v1/"):
                assert answer["error"]["type"] == "rate_limit_error"
                assert answer["error"]["code"] == "rate_limit_exceeded"
            else:
                assert answer["error_type"] == "overloaded"
        service.shard.steps.open()
        for response in await asyncio.gather(*held):
            assert response.status == 200
        assert (await service.post("/generate", BODY)).status == 200, "there is room again"


async def test_a_body_that_does_not_come_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafleet.router.body.BODY_SECONDS", 1.0)
    async with serving(max_concurrent_requests=1) as service:
        head = "POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{"
        slow = [asyncio.create_task(sent(service, head)) for _ in range(3)]
        concurrency = service.client.app[SERVICE].concurrency
        await until(lambda: concurrency._num_requests == 3)
        assert (await service.post("/generate", {"inputs": "a"})).status == 200
        assert {(await answer).split()[1] for answer in slow} == {"408"}


async def test_every_sequence_of_a_request_counts() -> None:
    async with serving(max_concurrent_requests=7) as service:
        body = {"model": "", "prompt": ["a", "b"], "n": 2, "temperature": 1.0, "max_tokens": 2}
        service.shard.steps.close()
        held = asyncio.create_task(service.json("/v1/completions", body))
        await until(lambda: in_service(service) == 4)
        assert (await service.post("/v1/completions", body)).status == 429
        service.shard.steps.open()
        assert len((await held)["choices"]) == 4
        too_many = await service.json("/v1/completions", body | {"prompt": ["a"] * 4}, status=422)
        assert too_many["error"]["param"] == "prompt"
        assert "makes 8 sequences; the service takes 7" in too_many["error"]["message"]
        assert len((await service.json("/v1/completions", body))["choices"]) == 4


async def test_ids_over_the_limit_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(max_input_length=8) as service:
        monkeypatch.delattr("lorafleet.router.tokenizer.Tokenizer.decode")
        body = {"model": "", "prompt": [FIRST_TEXT_ID] * 9, "echo": True}
        answer = await service.json("/v1/completions", body, status=422)
    assert "at most 8 tokens, got 9" in answer["error"]["message"]


async def test_a_text_too_long_to_tokenize_is_422() -> None:
    async with serving() as service:
        answer = await service.json("/tokenize", {"inputs": "a" * (2**18 + 1)}, status=422)
        assert answer["error"].startswith("`inputs` must have at most 262144 characters")
        assert len(await service.json("/tokenize", {"inputs": "ab"})) == 2


@pytest.mark.parametrize(("path", "body"), STREAMS)
async def test_a_client_that_leaves_frees_everything(path: str, body: Any) -> None:
    async with serving(FakeConfig(step_seconds=0.002)) as service:
        response = await service.post(path, body)
        await response.content.readline()
        service.engine.check()
        assert service.engine.stats().used_pages > 0
        response.close()
        await until(lambda: service.engine.stats().used_pages == 0)
        service.engine.check()
        assert await requests_total(service, path, 499) == 1


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_a_client_that_leaves_before_the_first_token_frees_everything(path: str) -> None:
    async with serving() as service:
        service.shard.steps.close()
        waiting = asyncio.create_task(service.post(path, BODY))
        await until(lambda: service.engine.stats().running == 1)
        waiting.cancel()
        await until(lambda: service.engine.stats().running == 0)
        service.shard.steps.open()
        await until(lambda: service.engine.stats().used_pages == 0)
        service.engine.check()


async def test_a_client_that_leaves_during_the_fetch_frees_everything() -> None:
    async with serving() as service:
        service.shard.fetching.close()
        body = {"inputs": "a", "parameters": {"adapter_id": "adapter-1"}}
        waiting = asyncio.create_task(service.post("/generate", body))
        await until(lambda: bool(service.shard.fetches))
        waiting.cancel()
        service.shard.fetching.open()
        assert (await service.post("/generate", body)).status == 200
        service.engine.check()


async def test_a_stop_string_ends_the_generation_at_once() -> None:
    async with serving() as service:
        answer = await service.generate(
            "stop here! ", stop=["!"], max_new_tokens=2000, details=True
        )
        assert answer["details"]["generated_tokens"] == 10
        service.engine.check()
        assert service.engine.stats().used_pages == 0


async def test_an_error_after_the_first_token_ends_the_stream_with_a_frame() -> None:
    for path, body in STREAMS:
        async with serving(FakeConfig(step_seconds=0.002)) as service:
            response = await service.post(path, body)
            await response.content.readline()
            service.shard.stop()
            text = await response.text()
            await until(service.engine.failed.is_set)
            *_, last = parse_frames("data:{}\n\n" + text.lstrip("\n"))
            failed = await requests_total(service, path, 503)
            health = await service.client.get("/health")
            later = await service.post(path, body)
        assert response.status == 200
        error = last["error"]
        assert error if path == "/generate_stream" else error["type"] == "server_error"
        assert failed == 1
        assert (health.status, later.status) == (503, 503)


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/completions"])
async def test_a_failed_sequence_fails_alone_with_500(path: str) -> None:
    poison = FIRST_TEXT_ID + ord("!") - 32
    async with serving(FakeConfig(echo=True, poison_id=poison)) as service:
        bad = {"inputs": "bad!", "prompt": "bad!", "model": ""}
        good = BODY | {"inputs": "good", "parameters": {"max_new_tokens": 4}}
        failed, fine = await asyncio.gather(
            service.json(path, bad, status=500), service.json("/generate", good)
        )
        service.engine.check()
    assert fine == {"generated_text": "good"}
    error = failed["error"]
    assert error["type"] == "server_error" if path.startswith("/v1") else error


async def test_one_failed_choice_fails_the_response_and_frees_the_others() -> None:
    poison = FIRST_TEXT_ID + ord("!") - 32
    async with serving(FakeConfig(echo=True, poison_id=poison)) as service:
        body = {"model": "", "prompt": ["fine", "bad!"], "max_tokens": 2000}
        await service.json("/v1/completions", body, status=500)
        await until(lambda: service.engine.stats().used_pages == 0)
        service.engine.check()


async def test_silent_streams_are_kept_alive() -> None:
    async with serving(keep_alive_seconds=0.03) as service:
        service.shard.steps.close()
        response = await service.post("/generate_stream", BODY)
        assert response.status == 200, "the stream begins although there is no token yet"
        assert await response.content.readline() == b":\n"
        service.shard.steps.open()
        frames = parse_frames(":\n" + await response.text())
    assert len(frames) == 1000


async def test_many_streams_at_once_are_whole_and_in_order() -> None:
    prompts = [f"prompt number {number} " for number in range(64)]
    async with serving(FakeConfig(echo=True, max_rows=16)) as service:
        answers = await asyncio.gather(*(stream_text(service, prompt) for prompt in prompts))
        service.engine.check()
    assert answers == [(prompt * 8)[:60] for prompt in prompts]


async def stream_text(service: Running, prompt: str) -> str:
    body = {"inputs": prompt, "parameters": {"max_new_tokens": 60}}
    frames = await service.frames("/generate_stream", body)
    text = "".join(frame["token"]["text"] for frame in frames)
    assert text == frames[-1]["generated_text"]
    return text


def in_service(service: Running) -> int:
    """Sequences with a row or without."""
    stats = service.engine.stats()
    return stats.running + stats.waiting


async def requests_total(service: Running, route: str, status: int) -> float:
    """A route's counter."""
    name = f'lorafleet_requests_total{{route="{route}",status="{status}"}}'
    response: ClientResponse = await service.client.get("/metrics")
    for line in (await response.text()).splitlines():
        if line.startswith(name):
            return float(line.split()[-1])
    return 0
