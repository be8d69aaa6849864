"""The demo model under 256 streams at once."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from rich.console import Console

from lorafleet.deploy.demo.build import DEFAULT_DIR, build
from lorafleet.deploy.demo.recipe import ADAPTERS
from tests.e2e.service import serve
from tests.e2e.test_streams import frames, wait_until_idle

ROOT = Path(__file__).parents[2]
NUM_STREAMS, NUM_TOKENS = 256, 16

pytestmark = pytest.mark.timeout(900)  # the first run on a machine trains


async def test_256_streams_complete(tmp_path: Path) -> None:
    folder = ROOT / DEFAULT_DIR
    build(folder, Console(file=io.StringIO()))
    names = [None, *(recipe.names[0] for recipe in ADAPTERS)]

    async def count_tokens(session: aiohttp.ClientSession, number: int) -> int:
        parameters: dict[str, Any] = {"max_new_tokens": NUM_TOKENS, "ignore_eos_token": True}
        if name := names[number % len(names)]:
            parameters |= {"adapter_id": name}
        body = {"inputs": f"Tell me about number {number}.", "parameters": parameters}
        return len(await frames(session, "/generate_stream", body))

    flags = ("--num-shard=2", f"--adapter-root={folder / 'adapters'}")
    with serve(folder / "model", tmp_path, *flags) as service:
        async with service.session() as session:
            counts = [count_tokens(session, number) for number in range(NUM_STREAMS)]
            assert await asyncio.gather(*counts) == [NUM_TOKENS] * NUM_STREAMS
        wait_until_idle(service)
