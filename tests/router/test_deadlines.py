"""A request's deadline: what is waiting, fetching or running when it comes, ends and frees all."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from tests.fakes import FakeConfig
from tests.router.http_service import parse_frames, serving, until

ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"inputs": "hello", "parameters": {"timeout": 0.2, "max_new_tokens": 1000}}),
    ("/generate_stream", {"inputs": "a", "parameters": {"timeout": 0.2, "max_new_tokens": 1000}}),
    ("/v1/completions", {"model": "", "prompt": "a", "max_tokens": 1000, "timeout": 0.2}),
]


def said(answer: Any) -> tuple[str, str]:
    """Kind and sentence of an error in either dialect."""
    error = answer["error"]
    if isinstance(error, str):
        return answer["error_type"], error
    return error["code"], error["message"]


@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_a_running_request_ends_with_504_and_its_row_is_free_at_once(
    path: str, body: dict[str, Any]
) -> None:
    async with serving() as service:
        service.shard.steps.close()  # no step ends, so only the deadline can free the row
        asked_at = time.monotonic()
        answer = await service.json(path, body, status=504)
        assert 0.2 <= time.monotonic() - asked_at < 5
        assert said(answer) == ("timeout", "the request was not done within its 0.2 s")
        assert service.engine.stats().running == 0
        assert service.engine.stats().used_pages == 0
        service.shard.steps.open()
        assert (await service.generate("x", max_new_tokens=2))["generated_text"] == "xx"


async def test_a_waiting_request_ends_and_the_running_one_does_not_notice() -> None:
    async with serving(FakeConfig(echo=True, max_rows=1, step_seconds=0.002)) as service:
        running = asyncio.create_task(service.generate("ab", max_new_tokens=400))
        await until(lambda: service.engine.stats().running == 1)
        body = {"inputs": "b", "parameters": {"timeout": 0.1}}
        assert said(await service.json("/generate", body, status=504))[0] == "timeout"
        assert service.engine.stats().waiting == 0
        assert (await running)["generated_text"] == "ab" * 200


async def test_the_deadline_counts_the_adapters_fetch_which_goes_on() -> None:
    async with serving() as service:
        service.shard.fetching.close()
        parameters = {"timeout": 0.1, "adapter_id": "adapter-1"}
        body = {"inputs": "b", "parameters": parameters}
        assert said(await service.json("/generate", body, status=504))[0] == "timeout"
        service.shard.fetching.open()
        await service.generate("b", adapter_id="adapter-1", max_new_tokens=1)
        assert len(service.shard.fetches) == 2, "the fetch that was under way is used"


@pytest.mark.parametrize("path", ["/generate_stream", "/v1/completions"])
async def test_a_stream_that_has_begun_ends_with_an_error_frame(path: str) -> None:
    async with serving(FakeConfig(echo=True, step_seconds=0.005)) as service:
        lorax = {"inputs": "ab", "parameters": {"timeout": 0.3, "max_new_tokens": 1000}}
        openai = ROUTES[2][1] | {"stream": True, "timeout": 0.3}
        response = await service.post(path, lorax if path == "/generate_stream" else openai)
        *tokens, last = parse_frames(await response.text())
        assert response.status == 200
        assert 0 < len(tokens) < 300
        assert said(last)[0] == "timeout"
        assert service.engine.stats().running == 0


async def test_the_servers_limit_is_the_default_and_the_most_one_may_ask_for() -> None:
    async with serving(request_timeout=0.2) as service:
        service.shard.steps.close()
        answer = await service.json("/generate", {"inputs": "a"}, status=504)
        assert "0.2 s" in said(answer)[1]
        body = {"inputs": "a", "parameters": {"timeout": 0.3}}
        refused = await service.json("/generate", body, status=422)
        assert said(refused)[1] == "`timeout` must be a number > 0 and <= 0.2, got 0.3"
        service.shard.steps.open()


@pytest.mark.parametrize("value", [0, -1, "5", True, 1e9])
async def test_a_timeout_out_of_range_is_refused(value: Any) -> None:
    async with serving() as service:
        body = {"inputs": "a", "parameters": {"timeout": value}}
        refused = await service.json("/generate", body, status=422)
    assert said(refused)[1].startswith("`timeout` must be a number > 0 and <= 86400, got ")


async def test_requests_in_time_leave_no_timer_behind() -> None:
    async with serving(request_timeout=60) as service:
        await service.generate("ab", max_new_tokens=3)
        loop: Any = asyncio.get_running_loop()
        assert not [handle for handle in loop._scheduled if "_expire" in repr(handle)]
