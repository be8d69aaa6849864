"""Priorities and the limits of an adapter's queue, over HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.fakes import FakeConfig
from tests.router.http_service import serving, until

ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"inputs": "a"}),
    ("/generate_stream", {"inputs": "a"}),
    ("/v1/completions", {"model": "", "prompt": "a"}),
    ("/v1/chat/completions", {"model": "", "messages": [{"role": "user", "content": "a"}]}),
]


def asking(path: str, body: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The body with these fields where the route has them."""
    return body | fields if path.startswith("/v1/") else body | {"parameters": fields}


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize("value", [-101, 101, 1.5, "high", True])
async def test_a_priority_out_of_range_is_422(path: str, body: dict[str, Any], value: Any) -> None:
    async with serving() as service:
        answer = await service.json(path, asking(path, body, priority=value), status=422)
    said = answer["error"]["message"] if path.startswith("/v1/") else answer["error"]
    assert said.startswith("`priority` must be an integer between -100 and 100, got ")


@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_every_route_lets_a_better_priority_start_first(
    path: str, body: dict[str, Any]
) -> None:
    config = FakeConfig(echo=True, max_rows=1, step_seconds=0.001)
    async with serving(config, priority_ageing_seconds=1000.0) as service:
        done: list[int] = []

        async def ask(priority: int) -> None:
            length = {"max_tokens": 4} if path.startswith("/v1/") else {"max_new_tokens": 4}
            asked = asking(path, body, priority=priority, **length)
            response = await service.post(path, asked)
            assert response.status == 200
            await response.read()
            done.append(priority)

        service.shard.steps.close()
        tasks = [asyncio.create_task(ask(-1))]
        await until(lambda: service.engine.stats().running == 1)
        for number, priority in enumerate((100, 0, -100), 1):
            tasks.append(asyncio.create_task(ask(priority)))
            await until(lambda wanted=number: service.engine.stats().waiting == wanted)
        service.shard.steps.open()
        await asyncio.gather(*tasks)
    assert done == [-1, -100, 0, 100]


@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_a_full_queue_is_429_and_other_queues_are_open(
    path: str, body: dict[str, Any]
) -> None:
    config = FakeConfig(echo=True, max_rows=1)
    async with serving(config, max_waiting_per_adapter=2) as service:
        service.shard.steps.close()
        tasks = [asyncio.create_task(service.generate("a", max_new_tokens=2))]
        await until(lambda: service.engine.stats().running == 1)
        tasks += [asyncio.create_task(service.generate("a", max_new_tokens=2)) for _ in range(2)]
        await until(lambda: service.engine.stats().waiting == 2)
        response = await service.post(path, body)
        answer = await response.json()
        said = answer["error"]["message"] if path.startswith("/v1/") else answer["error"]
        assert response.status == 429
        assert said == "2 requests wait for the base model, which is the limit of one adapter"
        assert 1 <= int(response.headers["Retry-After"]) <= 60
        other = asyncio.create_task(service.generate("a", adapter_id="adapter-1"))
        await until(lambda: service.engine.stats().waiting == 3)
        service.shard.steps.open()
        await asyncio.gather(other, *tasks)
        assert await service.generate("ab", max_new_tokens=2) == {"generated_text": "ab"}


async def test_requests_that_come_at_once_are_counted_when_they_are_queued() -> None:
    """All of them hold their adapter before the first is in the queue."""
    config = FakeConfig(echo=True, max_rows=1)
    async with serving(config, max_waiting_per_adapter=2) as service:
        service.shard.steps.close()
        body = {"inputs": "a", "parameters": {"max_new_tokens": 2}}
        tasks = [asyncio.create_task(service.post("/generate", body)) for _ in range(12)]
        stats = service.engine.stats

        def num_refused() -> int:
            return sum(task.done() for task in tasks)

        await until(lambda: num_refused() + stats().running + stats().waiting == 12)
        assert num_refused() >= 9  # of the other three at most one has the row
        service.shard.steps.open()
        statuses = [response.status for response in await asyncio.gather(*tasks)]
        assert statuses.count(200) in (2, 3)
        assert statuses.count(200) + statuses.count(429) == 12


async def test_requests_whose_adapter_is_being_fetched_count_in_its_queue() -> None:
    async with serving(max_waiting_per_adapter=3) as service:
        service.shard.fetching.close()
        body = {"inputs": "a", "parameters": {"adapter_id": "adapter-1", "max_new_tokens": 2}}
        tasks = [asyncio.create_task(service.post("/generate", body)) for _ in range(4)]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        (refused,) = [task.result() for task in done]
        assert "adapter adapter-1" in (await refused.json())["error"]
        service.shard.fetching.open()
        statuses = [response.status for response in await asyncio.gather(*tasks)]
        assert sorted(statuses) == [200, 200, 200, 429]
        assert (await service.post("/generate", body)).status == 200


async def test_an_adapter_runs_no_more_than_its_limit() -> None:
    async with serving(FakeConfig(echo=True), max_running_per_adapter=2) as service:
        service.shard.steps.close()
        # In one request, so that all are there for the first plan: no more than two are sent ahead.
        body = {"model": "", "prompt": ["a", "a", "a"], "max_tokens": 2}
        task = asyncio.create_task(service.json("/v1/completions", body))
        stats = service.engine.stats
        await until(lambda: (stats().running, stats().waiting) == (2, 1))
        service.shard.steps.open()
        assert len((await task)["choices"]) == 3
