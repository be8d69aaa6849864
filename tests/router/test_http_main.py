"""The router as the launcher runs it: a process with a life."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import ClientSession

from tests.fakes import FakeConfig, FakeShard
from tests.router.http_service import parse_frames

BODY = {"inputs": "hello", "parameters": {"max_new_tokens": 200}}


@asynccontextmanager
async def router(shard: FakeShard, *flags: str) -> AsyncIterator[tuple[Process, str]]:
    """A router process and its URL."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lorafleet.router", "--hostname", "127.0.0.1", "--port", "0"),
        *("--shards", shard.address, "--adapter-source", "local", *flags),
        stdin=PIPE,
        stdout=PIPE,
        env={"LORAFLEET_PARENT_PIPE": "1", "PYTHONWARNINGS": "error"},
    )
    assert process.stdout is not None
    try:
        line = await process.stdout.readline()
        ready = json.loads(line) if line else {"event": "ended", "url": ""}
        assert ready["event"] == "ready"
        yield process, ready["url"]
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_sigterm_lets_running_requests_finish() -> None:
    with FakeShard(FakeConfig(echo=True, step_seconds=0.002)) as shard:
        async with router(shard) as (process, url), ClientSession() as session:
            response = await session.post(f"{url}/generate_stream", json=BODY)
            first = await response.content.readline()
            process.send_signal(signal.SIGTERM)
            while (await session.get(f"{url}/health")).status == 200:
                pass
            refused = await session.post(f"{url}/generate", json=BODY)
            assert refused.status == 503
            frames = parse_frames((first + await response.content.read()).decode())
            assert len(frames) == 200
            assert await process.wait() == 0


async def metrics(session: ClientSession, url: str) -> str:
    return await (await session.get(f"{url}/metrics")).text()


async def test_what_does_not_finish_in_the_grace_is_cut_off() -> None:
    with FakeShard() as shard:
        async with (
            router(shard, "--shutdown-grace-seconds", "0.05") as (process, url),
            ClientSession() as session,
        ):
            shard.steps.close()
            waiting = asyncio.create_task(session.post(f"{url}/generate", json=BODY))
            while "sequences_running 1.0" not in await metrics(session, url):
                pass
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
            with pytest.raises(Exception, match=r"disconnected|reset|closed"):
                await waiting


async def test_a_lost_shard_ends_the_router_with_an_error() -> None:
    with FakeShard() as shard:
        async with router(shard) as (process, _):
            shard.stop()
            assert await process.wait() == 1


async def test_the_router_ends_with_its_launcher() -> None:
    with FakeShard() as shard:
        async with router(shard) as (process, _):
            assert process.stdin is not None
            process.stdin.close()
            assert await process.wait() == 0


async def test_sigterm_ends_a_router_that_is_still_connecting() -> None:
    with FakeShard() as shard:
        shard.loading = True
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "lorafleet.router", "--shards", shard.address, "--port", "0"),
            stderr=PIPE,
        )
        assert process.stderr is not None
        await process.stderr.readline()  # it says that it connects
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


async def test_a_bad_flag_is_named() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lorafleet.router", "--port", "70000"), stderr=PIPE
    )
    _, said = await process.communicate()
    assert process.returncode == 2
    assert b"--port must be between 0 and 65535, got 70000" in said
