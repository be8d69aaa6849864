"""What is there before the first request: --preloaded-adapter-ids and --adapter-aliases."""

from __future__ import annotations

import asyncio
import logging

from lorafleet.proto.messages import AdapterKey, ShardInfo, Tier
from lorafleet.router.adapter_calls import check_alias
from lorafleet.router.adapter_names import AdapterNames
from lorafleet.router.config import RouterConfig
from lorafleet.router.engine import Engine
from lorafleet.router.errors import AdapterError, InvalidRequest, Overloaded
from lorafleet.router.prompt import is_id

log = logging.getLogger(__name__)

_AT_ONCE = 16


async def preload(engine: Engine, config: RouterConfig) -> None:
    """Loads and pins them in host memory; checks the aliases.

    Each is copied to the device as well, where it stays until another adapter needs the place.
    Raises ValueError naming one that cannot be, ShardLost.
    """
    wanted = _preloaded(config, engine.info)
    gate = asyncio.Semaphore(_AT_ONCE)

    async def load(name: str, key: AdapterKey) -> None:
        async with gate:
            try:
                await engine.control.pin(key, "", Tier.HOST)
                await engine.control.load(key, "", Tier.DEVICE)
            except (AdapterError, Overloaded) as error:
                raise ValueError(f"--preloaded-adapter-ids {name}: {error}") from error

    try:
        async with asyncio.TaskGroup() as group:
            for key, name in wanted.items():
                group.create_task(load(name, key))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    await _check_aliases(engine, config)
    if wanted:
        log.info("%d adapters are preloaded", len(wanted))


def _preloaded(config: RouterConfig, info: ShardInfo) -> dict[AdapterKey, str]:
    names = AdapterNames.of(config, info)
    wanted: dict[AdapterKey, str] = {}
    for name in config.preloaded_adapter_ids:
        try:
            key = names.key(config.preloaded_adapter_source or names.default_source, name)
        except ValueError as error:
            raise ValueError(f"--preloaded-adapter-ids {name}: {error}") from error
        wanted.setdefault(key, name)
    return wanted


def configured_names(config: RouterConfig, info: ShardInfo) -> AdapterNames:
    """The names the operator starts with. Raises ValueError naming an alias that cannot be."""
    names = AdapterNames.of(config, info)
    for text in config.adapter_aliases:
        name, _, adapter_id = text.partition("=")
        try:
            check_alias("NAME", name, info.model_id)
            if not is_id(adapter_id):
                raise ValueError("must be NAME=ADAPTER_ID")
            key = names.key(names.default_source, adapter_id)
        except (InvalidRequest, ValueError) as error:
            raise ValueError(f"--adapter-aliases {text}: {error}") from error
        names.aliases.point(name, key)
    return names


async def _check_aliases(engine: Engine, config: RouterConfig) -> None:
    names = configured_names(config, engine.info)
    for alias, key in names.aliases:
        hidden = names.hidden_by(alias, key)
        if hidden is not None and await engine.holds(hidden):
            raise ValueError(f"--adapter-aliases {alias}: this is the name of an adapter")
