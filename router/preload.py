"""What is there before the first request: --preloaded-adapter-ids and --adapter-aliases."""

from __future__ import annotations

import asyncio
import logging

from lorafleet.proto.messages import Tier
from lorafleet.router.adapter_calls import check_alias
from lorafleet.router.aliases import Aliases
from lorafleet.router.config import RouterConfig
from lorafleet.router.engine import Engine
from lorafleet.router.errors import AdapterError, InvalidRequest, Overloaded
from lorafleet.router.prompt import adapter_key, is_id

log = logging.getLogger(__name__)

_AT_ONCE = 16


async def preload(engine: Engine, config: RouterConfig) -> None:
    """Loads and pins them in host memory; checks the aliases.

    Each is copied to the device as well, where it stays until another adapter needs the place.
    Raises ValueError naming one that cannot be, ShardLost.
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
    await _check_aliases(engine, config)
    if names:
        log.info("%d adapters are preloaded", len(names))


def configured_aliases(config: RouterConfig, model_id: str) -> Aliases:
    """The aliases the operator starts with. Raises ValueError naming one that cannot be."""
    aliases = Aliases()
    for text in config.adapter_aliases:
        name, _, adapter_id = text.partition("=")
        try:
            check_alias("NAME", name, model_id)
        except InvalidRequest as error:
            raise ValueError(f"--adapter-aliases {text}: {error}") from error
        if not is_id(adapter_id):
            raise ValueError(f"--adapter-aliases {text} must be NAME=ADAPTER_ID")
        aliases.point(name, adapter_key(config.adapter_source or "hub", adapter_id))
    return aliases


async def _check_aliases(engine: Engine, config: RouterConfig) -> None:
    known = {status.key for status in await engine.all_adapters()}
    for name, key in configured_aliases(config, engine.info.model_id):
        hidden = adapter_key(config.adapter_source or "hub", name)
        if hidden != key and hidden in known:
            raise ValueError(f"--adapter-aliases {name}: this is the name of an adapter")
