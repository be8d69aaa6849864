"""python -m lorafleet.router: connects to the shards and serves HTTP until told to stop.

Prints one JSON line, {"event": "ready", "url": ...}, when it takes requests. Ends with 0 after
SIGTERM or SIGINT, 1 when the shards are gone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from aiohttp import web

from lorafleet.proto.flags import add_flags, from_flags
from lorafleet.proto.lifeline import watch_parent
from lorafleet.router.app import build_app
from lorafleet.router.concurrency import Concurrency
from lorafleet.router.config import RouterConfig
from lorafleet.router.engine import Engine
from lorafleet.router.errors import ShardLost
from lorafleet.router.preload import preload
from lorafleet.router.service import SERVICE

log = logging.getLogger("lorafleet.router")

_CLOSE_SECONDS = 1.0  # what responses get to be written after drain or failure


class _Stop:
    """What ends the process: asked once it drains, asked twice it goes."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.at_once = asyncio.Event()

    def ask(self) -> None:
        """For a signal."""
        (self.at_once if self.asked.is_set() else self.asked).set()

    def now(self) -> None:
        """When nobody is left to serve for."""
        self.asked.set()
        self.at_once.set()


def main() -> None:
    """Parses flags and serves."""
    parser = ArgumentParser("python -m lorafleet.router", description=__doc__)
    add_flags(parser, RouterConfig)
    try:
        config = from_flags(RouterConfig, parser.parse_args())
    except ValueError as error:
        parser.error(str(error))
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s router: %(message)s",
    )
    try:
        sys.exit(asyncio.run(_run(config)))
    except (ShardLost, ValueError, OSError) as error:
        log.error("%s", error)
        sys.exit(1)


async def _run(config: RouterConfig) -> int:
    """Serves until stopped; the exit code."""
    loop, stop = asyncio.get_running_loop(), _Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.ask)
    watch_parent(partial(_from_thread, loop, stop.now))
    log.info("connecting to %s", " ".join(config.shards))
    connecting = asyncio.create_task(_connect(config))
    await _first(connecting, stop.asked.wait())
    if not connecting.done():
        connecting.cancel()
        await asyncio.gather(connecting, return_exceptions=True)
        return 0
    engine = connecting.result()
    try:
        return await _serve(engine, config, stop)
    finally:
        await engine.close()


async def _connect(config: RouterConfig) -> Engine:
    engine = await Engine.start(config)
    try:
        await preload(engine, config)
    except BaseException:
        await engine.close()
        raise
    return engine


async def _serve(engine: Engine, config: RouterConfig, stop: _Stop) -> int:
    app = build_app(engine, config)
    runner = web.AppRunner(
        app, handler_cancellation=True, access_log=None, shutdown_timeout=_CLOSE_SECONDS
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, config.hostname, config.port).start()
        port = runner.addresses[0][1]
        print(json.dumps({"event": "ready", "url": _url(config.hostname, port)}), flush=True)
        await _first(stop.asked.wait(), engine.failed.wait())
        if engine.failed.is_set():
            log.error("stopping: %s", engine.failure)
            return 1
        await _drain(app[SERVICE].concurrency, config.shutdown_grace_seconds, stop)
        return 0
    finally:
        await runner.cleanup()


async def _drain(concurrency: Concurrency, grace_seconds: float, stop: _Stop) -> None:
    """Lets running requests finish, but no longer than the grace and not when told to hurry."""
    log.info("draining: running requests have %g s", grace_seconds)
    await _first(concurrency.drain(), stop.at_once.wait(), asyncio.sleep(grace_seconds))


def _from_thread(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    loop.call_soon_threadsafe(call)


async def _first(*calls: Awaitable[Any]) -> None:
    """Until one of the calls is done; helpers that are still waiting are cancelled."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task, call in zip(tasks, calls, strict=True):
        if task is not call:
            task.cancel()


def _url(hostname: str, port: int) -> str:
    host = "127.0.0.1" if hostname in ("", "0.0.0.0", "::") else hostname
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


if __name__ == "__main__":
    main()
