"""Launch: one group of shards and its router on this machine, from start to stop."""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lorafleet.deploy.banner import banner
from lorafleet.deploy.child import Child, how_it_ended
from lorafleet.deploy.output import leave
from lorafleet.deploy.resources import rank_environments
from lorafleet.deploy.screen import Screen
from lorafleet.proto.flags import secrets_of, to_flags
from lorafleet.router.config import RouterConfig
from lorafleet.shard.config import ShardConfig

SHARD_STOP_SECONDS = 10.0
FAILURE_STOP_SECONDS = 5.0  # for the survivors, when a process has died
ROUTER_MARGIN_SECONDS = 5.0  # beyond the router's own grace
MAX_SOCKET_FOLDER = 70  # characters; a unix socket's path has at most 107


@dataclass(frozen=True, slots=True)
class Programs:
    """The command lines before the flags. -P: the working directory holds no modules of ours."""

    shard: tuple[str, ...] = (sys.executable, "-P", "-m", "lorafleet.shard")
    router: tuple[str, ...] = (sys.executable, "-P", "-m", "lorafleet.router")


@dataclass(slots=True)
class Launch:
    """Starts the processes, watches them, and stops them in order: router first, then shards."""

    shard_config: ShardConfig
    router_config: RouterConfig
    programs: Programs = field(default_factory=Programs)
    screen: Screen = field(default_factory=Screen)
    _shards: list[Child] = field(default_factory=list, init=False)
    _router: Child | None = field(default=None, init=False)
    _ready: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)
    _asked_to_stop: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    async def run(self) -> int:
        """Serves until SIGINT or SIGTERM (returns 0) or until a process dies (returns 1).

        Raises ValueError when this machine lacks the devices that the configs ask for, SystemExit,
        once all is stopped, when nobody reads what it prints any more.
        """
        environments = rank_environments(self.shard_config.num_shard, self.shard_config.device)
        self._take_signals()
        with tempfile.TemporaryDirectory(prefix="lorafleet-", dir=_socket_folder()) as folder:
            try:
                await self._start(Path(folder), environments)
                return await self._watch()
            finally:
                await self._stop()

    def _take_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self._asked_to_stop.is_set():
            self.screen.note("killing every process")
            for child in self._children():
                child.kill()
            return
        self._asked_to_stop.set()
        grace = f"{self.router_config.shutdown_grace_seconds:g} s"
        self.screen.note(f"stopping: running requests get up to {grace}; once more kills them")

    async def _start(self, folder: Path, environments: list[dict[str, str]]) -> None:
        secrets = secrets_of(self.router_config)
        withheld = dict.fromkeys(secrets, "")  # the router's are none of the shards' business
        addresses = tuple(f"unix:{folder}/shard-{rank}.sock" for rank in range(len(environments)))
        for rank, environment in enumerate(environments):
            config = replace(
                self.shard_config,
                rank=rank,
                listen=addresses[rank],
                rendezvous=f"file://{folder}/rendezvous",
            )
            command = [*self.programs.shard, *to_flags(config)]
            self._shards.append(await self._child(f"shard {rank}", command, withheld | environment))
        command = [*self.programs.router, *to_flags(replace(self.router_config, shards=addresses))]
        self._router = await self._child("router", command, secrets)

    async def _child(self, name: str, command: list[str], environment: dict[str, str]) -> Child:
        return await Child.start(name, command, environment, self._on_event, self.screen.log)

    def _on_event(self, child: Child, event: dict[str, Any]) -> None:
        if event["event"] == "loading" and event["total_bytes"]:
            self.screen.loading(event["done_bytes"], event["total_bytes"])
        elif event["event"] == "ready":
            self._ready[child.name] = event
            if len(self._ready.keys() - {"router"}) == self.shard_config.num_shard:
                self.screen.loaded()
            if len(self._ready) == self.shard_config.num_shard + 1:
                self._show_banner()

    def _show_banner(self) -> None:
        info = self._ready["shard 0"]["info"]
        url = self._ready["router"]["url"]
        try:
            print(banner(info, self.shard_config, self.router_config, url), flush=True)
        except BrokenPipeError:
            leave()

    async def _watch(self) -> int:
        exits = {child.exited: child for child in self._children()}
        asked = asyncio.create_task(self._asked_to_stop.wait())
        awaited: list[asyncio.Future[Any]] = [asked, *exits]
        done, _ = await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        if asked in done:
            return 0
        asked.cancel()
        self.screen.loaded()
        for future, child in exits.items():
            if future in done:
                self._report(child)
        return 1

    def _report(self, child: Child) -> None:
        lines = "\n".join(f"    {line}" for line in child.last_lines)
        last_words = f"its last lines:\n{lines}" if lines else "it wrote nothing"
        ended = how_it_ended(child.exited.result())
        self.screen.note(f"lorafleet: {child.name} {ended}; {last_words}\nlorafleet: stopping")

    async def _stop(self) -> None:
        self.screen.loaded()
        asked = self._asked_to_stop.is_set()
        router_grace = self.router_config.shutdown_grace_seconds + ROUTER_MARGIN_SECONDS
        if self._router is not None:
            await _end([self._router], router_grace if asked else FAILURE_STOP_SECONDS)
        await _end(self._shards, SHARD_STOP_SECONDS if asked else FAILURE_STOP_SECONDS)

    def _children(self) -> list[Child]:
        return self._shards + ([self._router] if self._router is not None else [])


async def _end(children: Iterable[Child], grace_seconds: float) -> None:
    """SIGTERM, then SIGKILL for what is still there after the grace."""
    children = list(children)
    for child in children:
        child.terminate()
    exits = [child.exited for child in children]
    _, running = await asyncio.wait(exits, timeout=grace_seconds) if exits else (set(), set())
    for child in children:
        child.kill()  # sweeps up what an ended child left behind, too
    if running:
        await asyncio.wait(running)
    for child in children:
        child.close()


def _socket_folder() -> str | None:
    return None if len(tempfile.gettempdir()) <= MAX_SOCKET_FOLDER else "/tmp"
