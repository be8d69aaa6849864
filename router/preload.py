"""--preloaded-adapter-ids: adapters that are there before the first request."""

from __future__ import annotations

import asyncio
import logging

from lorafleet.proto.messages import Tier
from lorafleet.router.config import RouterConfig
from lorafleet.router.engine import Engine
from lorafleet.router.errors import AdapterError, Overloaded
from lorafleet.router.prompt import adapter_key

log = logging.getLogger(__name__)

_AT_ONCE = 16


async def preload(engine: Engine, config: RouterConfig) -> None:
    """Loads and pins them in host memory. Raises ValueError naming one that cannot be, ShardLost.

    Each is copied to the device as well, where it stays until another adapter needs the place.
    """
    source = config.preloaded_adapter_source or config.adapter_source or "hub"
    gate = asyncio.Semaphore(_AT_ONCE)

    async def load(name: str) -> None:
        key = adapter_key(source, name)
        async with gate:
            try:
                await engine.control.pin(key, "", Tier.HOST)
                await engine.control.load(key, "", Tier.DEVICE)
            except (AdapterError, Overloaded) as error:
                raise ValueError(f"--preloaded-adapter-ids {name}: {error}") from error

    names = dict.fromkeys(config.preloaded_adapter_ids)
    try:
        async with asyncio.TaskGroup() as group:
            for name in names:
                group.create_task(load(name))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    if names:
        log.info("%d adapters are preloaded", len(names))
