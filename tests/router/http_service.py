"""The router's HTTP service over a real engine and a fake shard, for tests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient, TestServer

from lorafleet.router.app import build_app
from lorafleet.router.config import RouterConfig
from lorafleet.router.engine import Engine
from lorafleet.router.service import SERVICE
from tests.fakes import FakeConfig, FakeShard


@dataclass(slots=True)
class Running:
    """A service that answers, and what is behind it."""

    client: TestClient[Any, Any]
    engine: Engine
    shard: FakeShard

    async def post(self, path: str, body: Any, **headers: str) -> ClientResponse:
        """The response to a JSON body."""
        return await self.client.post(path, json=body, headers=headers)

    async def json(self, path: str, body: Any, status: int = 200, **headers: str) -> Any:
        """The JSON answer, after checking the status."""
        response = await self.post(path, body, **headers)
        answer = await response.json()
        assert response.status == status, answer
        return answer

    async def generate(self, inputs: str, **parameters: Any) -> Any:
        """/generate's answer."""
        return await self.json("/generate", {"inputs": inputs, "parameters": parameters})

    async def frames(self, path: str, body: Any) -> list[Any]:
        """Every frame of a stream, `[DONE]` as a string."""
        response = await self.post(path, body)
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        return parse_frames(await response.text())


def parse_frames(text: str) -> list[Any]:
    """Server-sent events, comments left out."""
    assert text.endswith("\n\n")
    frames = [frame for frame in text[:-2].split("\n\n") if not frame.startswith(":")]
    assert all(frame.startswith("data:") for frame in frames)
    values = [frame.removeprefix("data:").strip() for frame in frames]
    return [value if value == "[DONE]" else json.loads(value) for value in values]


async def until(condition: Any) -> None:
    """Lets the service go on until the condition holds; the test's own timeout is the limit."""
    while not condition():  # noqa: ASYNC110  the service has no event for it
        await asyncio.sleep(0.001)


@asynccontextmanager
async def serving(
    config: FakeConfig | None = None, *, keep_alive_seconds: float = 15.0, **flags: Any
) -> AsyncIterator[Running]:
    """A service with these router flags; its ledgers must balance when the test is done."""
    with FakeShard(config or FakeConfig(echo=True)) as shard:
        router = RouterConfig(shards=(shard.address,), **({"adapter_source": "local"} | flags))
        engine = await Engine.start(router)
        app = build_app(engine, router)
        app[SERVICE].keep_alive.seconds = keep_alive_seconds
        # aiohttp's TestServer runs with handler_cancellation, as the router does.
        async with TestClient(TestServer(app)) as client:
            yield Running(client, engine, shard)
        if not engine.failed.is_set():
            engine.check()
        await engine.close()


async def listed(service: Running) -> dict[str, Any]:
    """/v1/adapters, by id."""
    response = await service.client.get("/v1/adapters")
    assert response.status == 200, await response.text()
    return {adapter["id"]: adapter for adapter in (await response.json())["data"]}


async def delete(service: Running, path: str) -> tuple[int, Any]:
    """The status and the answer."""
    response: ClientResponse = await service.client.delete(path)
    return response.status, await response.json()


async def sent(service: Running, text: str) -> str:
    """The first line of the answer to what no client library sends."""
    server = service.client.server
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        writer.write(text.encode())
        return (await asyncio.wait_for(reader.readline(), 60)).decode()
    finally:
        writer.close()
