"""Superseded: contents that a reload replaced, for as long as requests use them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress

from lorafleet.proto.messages import AdapterContent, AdapterKey
from lorafleet.router.adapter import Adapter
from lorafleet.router.errors import ShardLost
from lorafleet.router.tiers import HostAndDisk


class Superseded:
    """Owns each such adapter until its last request has ended; then its copies go."""

    def __init__(self, tiers: HostAndDisk, on_dropped: Callable[[Adapter], None]) -> None:
        """`on_dropped` is called before an adapter's host copy goes."""
        self._tiers, self._on_dropped = tiers, on_dropped
        self._adapters: dict[AdapterContent, Adapter] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._adapters.values())

    def find(self, content: AdapterContent) -> Adapter | None:
        """The adapter with this content, if it is here."""
        return self._adapters.get(content)

    def is_pinned(self, key: AdapterKey) -> bool:
        """Whether a request uses an older content of the adapter."""
        return any(adapter.is_pinned for adapter in self if adapter.key == key)

    def add(self, adapter: Adapter) -> None:
        """An adapter that is not what its key stands for any more."""
        self._adapters[adapter.content] = adapter
        task = asyncio.create_task(self._retire(adapter))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def take(self, content: AdapterContent) -> Adapter | None:
        """Gives an adapter up: its content is the present one again."""
        return self._adapters.pop(content, None)

    async def close(self) -> None:
        """Waits for no request any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _retire(self, adapter: Adapter) -> None:
        content = adapter.content
        await self._tiers.until(lambda: not (adapter.is_pinned and self._owns(adapter)))
        if self._owns(adapter):
            del self._adapters[content]
            adapter.in_host = False
            self._on_dropped(adapter)
            self._tiers.wake()
            with suppress(ShardLost):  # then there is nothing to drop
                await self._tiers.drop_content(content)

    def _owns(self, adapter: Adapter) -> bool:
        return self._adapters.get(adapter.content) is adapter
