"""HostAndDisk: the bytes adapters take in the shards' host memory and on their disks."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from lorafleet.cache.residency import ByteLedger
from lorafleet.proto.messages import AdapterContent, AdapterInfo, AdapterKey, Tier
from lorafleet.router.activity import Activity
from lorafleet.router.errors import (
    AdapterChanged,
    AdapterUnservable,
    NoAdapterRoom,
    Overloaded,
)
from lorafleet.router.shards import ShardGroup
from lorafleet.router.tasks import shared

K = TypeVar("K", bound=Hashable)
Pinned = Callable[[K], bool]


class HostAndDisk:
    """Fetches adapters, evicting the least recently used ones that are not pinned to make room.

    While everything is pinned, fetches wait, in order of arrival. A fetch that waits holds nothing
    in that tier, and a host copy never waits for disk room, so what is waited for can always end.
    """

    def __init__(
        self,
        shards: ShardGroup,
        is_host_pinned: Pinned[AdapterContent],
        is_disk_pinned: Pinned[AdapterKey],
        forget: Callable[[AdapterKey, AdapterContent | None], None],
        activity: Activity,
    ) -> None:
        self.host = ByteLedger[AdapterContent](shards.info.host_bytes)
        self.disk = ByteLedger[AdapterKey](shards.info.disk_bytes)  # downloaded adapters only
        self._shards = shards
        self._is_host_pinned = is_host_pinned
        self._is_disk_pinned = is_disk_pinned
        self._activity = activity
        # Called before the copies of an evicted adapter go, or of only one content of it.
        self._forget = forget
        self._kept: dict[AdapterKey, AdapterContent] = {}  # by `keep`, with what is kept in host
        self._host_room = asyncio.Lock()  # whoever holds it makes room; the others queue behind
        self._disk_room = asyncio.Lock()
        self._unpinned = asyncio.Event()
        self._loading = Counter[AdapterKey]()  # to host, room included: nothing of it is dropped
        # Under way: from disk, and of single contents.
        self._drops: dict[AdapterKey | AdapterContent, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Counts what the shards hold from before, and evicts what is over a budget."""
        for info in await self._shards.list_adapters():
            if info.disk_bytes:
                self.disk.put(info.key, info.disk_bytes)
            if info.tier >= Tier.HOST and info.digest:
                self.host.put(info.content, info.packed_bytes)
            elif info.tier >= Tier.HOST:  # ranks have different contents
                await self._shards.drop(info.key, Tier.HOST)
        await self._make_disk_room(0)
        await self._make_host_room(0)

    async def fetch_to_disk(
        self, key: AdapterKey, api_token: str, refresh: bool = False, digest: str = ""
    ) -> AdapterInfo:
        """Validates and sizes an adapter on every rank, downloading it if it is remote.

        With `refresh` as its source has it now, whatever is held; with a digest that content,
        where host memory has it.
        """
        started_at = time.monotonic()
        try:
            info = await self._fetch_to_disk(key, api_token, refresh, digest)
        except AdapterUnservable:
            await self._drop_refused(key)
            raise
        if info.tier < Tier.HOST:  # it was not only asked whether this caller may have it
            self._activity.loaded(key, Tier.DISK, time.monotonic() - started_at)
        if info.disk_bytes > self.disk.budget:
            await self._shards.drop(key, Tier.DISK, info.digest)
            raise AdapterUnservable(
                f"adapter {key} is {info.disk_bytes} bytes, more than the "
                f"{self.disk.budget} bytes --adapter-disk-bytes gives"
            )
        if self.disk.nbytes(key) != info.disk_bytes:
            # Only a finished download has a known size, so room is made after it.
            self.disk.remove(key)
            self.wake()
            async with self._disk_room:
                await self._make_disk_room_or_drop(info)
                self.disk.put(key, info.disk_bytes)
        return info

    async def load_to_host(
        self, content: AdapterContent, nbytes: int, api_token: str
    ) -> AdapterInfo:
        """Packs an adapter that the caller has pinned into every rank's host memory.

        Raises AdapterChanged, with nothing packed, if its source has other content by now.
        """
        try:
            with self._counted(content.key):
                return await self._load_to_host(content, nbytes, api_token)
        except AdapterChanged:
            raise
        except AdapterUnservable:
            await self._drop_refused(content.key)
            raise

    @contextmanager
    def _counted(self, key: AdapterKey) -> Iterator[None]:
        self._loading[key] += 1
        try:
            yield
        finally:
            self._loading[key] -= 1
            if not self._loading[key]:
                del self._loading[key]

    async def _load_to_host(
        self, content: AdapterContent, nbytes: int, api_token: str
    ) -> AdapterInfo:
        key = content.key
        await self._dropped(key)
        await self._dropped(content)
        self.host.remove(content)
        async with self._host_room:
            await self._make_host_room(nbytes)
            self.host.put(content, nbytes)
        started_at = time.monotonic()
        try:
            info = await self._shards.fetch(key, Tier.HOST, api_token, digest=content.digest)
            if info.content != content:
                raise AdapterChanged(f"adapter {key} changed while it was loaded")
            self._activity.loaded(key, Tier.HOST, time.monotonic() - started_at)
            return info
        except BaseException:
            await self.drop_content(content)  # some ranks may have it
            raise

    async def drop(self, key: AdapterKey) -> None:
        """Forgets an adapter in every tier."""
        self.disk.remove(key)
        try:
            await self._shards.drop(key, Tier.DISK)
        finally:
            for content in [content for content in self.host if content.key == key]:
                self.host.remove(content)
            self.wake()

    async def drop_content(self, content: AdapterContent) -> None:
        """Forgets one content's copy in host memory."""
        await shared(self._drops, content, self._drop_content(content))

    async def _drop_content(self, content: AdapterContent) -> None:
        try:
            await self._shards.drop(content.key, Tier.HOST, content.digest)
        finally:
            self.host.remove(content)
            self.wake()

    async def delete_uncounted(self, key: AdapterKey) -> None:
        """Deletes what the shards fetched of themselves, to merge it, after it was evicted here.

        Nobody may be fetching it: what is counted, or not downloaded, is left as it is.
        """
        if key.source != "local" and key not in self.disk and key not in self._drops:
            await self._delete(key)

    def keep(self, content: AdapterContent) -> None:
        """An adapter in host memory stays there, and its download on disk, until `unkeep`.

        Instead of any other content of it that was kept.
        """
        key, before = content.key, self._kept.get(content.key)
        if before is not None and before != content:
            self.host.unkeep(before)
        self._kept[key] = content
        self.host.keep(content)
        self.disk.keep(key)
        self.wake()  # for those whose adapter can never fit now

    def unkeep(self, key: AdapterKey) -> None:
        """Ends `keep`; nothing if the adapter was not kept."""
        if key in self._kept:
            self.host.unkeep(self._kept.pop(key))
        self.disk.unkeep(key)
        self.wake()

    def is_kept(self, key: AdapterKey) -> bool:
        """Whether `keep` holds."""
        return key in self._kept

    def touch(self, content: AdapterContent) -> None:
        """An adapter was used now."""
        self.host.touch(content)
        self.disk.touch(content.key)

    def wake(self) -> None:
        """Something may be unpinned: whoever waits looks again."""
        self._unpinned.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for a condition that pins and claims decide."""
        while not condition():
            self._unpinned.clear()
            await self._unpinned.wait()

    def check(self) -> None:
        """Asserts that the ledgers balance and are within budget."""
        for ledger in (self.host, self.disk):
            ledger.check()
            assert ledger.used <= ledger.budget, "a tier is over its budget"

    async def _dropped(self, what: AdapterKey | AdapterContent) -> None:
        """Returns when no drop of it is under way."""
        while what in self._drops:
            await asyncio.wait([self._drops[what]])

    async def _fetch_to_disk(
        self, key: AdapterKey, api_token: str, refresh: bool, digest: str
    ) -> AdapterInfo:
        await self._dropped(key)
        fetch = partial(self._shards.fetch, key, Tier.DISK, api_token, digest=digest)
        while True:
            try:
                return await fetch(refresh=refresh)
            except AdapterChanged:
                if refresh:
                    raise
                refresh = True  # the ranks may only have asked at different times
            except Overloaded:
                # The disk filled up before the size was known; without anything to evict, the
                # caller hears it.
                async with self._disk_room:
                    victim = self.disk.oldest(self._is_disk_pinned)
                    if victim is None:
                        raise
                    await self._evict_from_disk(victim)

    async def _drop_refused(self, key: AdapterKey) -> None:
        """What was downloaded and cannot be served takes no room, unless it once could be."""
        if not self._loading[key] and all(content.key != key for content in self.host):
            self._forget(key, None)
            await self._delete(key)
            return
        for info in await self._shards.list_adapters():
            if info.key == key and info.disk_bytes:
                self.disk.put(key, info.disk_bytes)

    async def _make_host_room(self, nbytes: int) -> None:
        ledger = self.host
        while ledger.used + nbytes > ledger.budget:
            victim = await self._victim(ledger, nbytes, self._is_host_pinned)
            ledger.num_evictions += 1
            self._activity.evicted(victim.key, Tier.HOST)
            self._forget(victim.key, victim)
            await self.drop_content(victim)

    async def _make_disk_room(self, nbytes: int) -> None:
        ledger = self.disk
        while ledger.used + nbytes > ledger.budget:
            await self._evict_from_disk(await self._victim(ledger, nbytes, self._is_disk_pinned))

    async def _make_disk_room_or_drop(self, info: AdapterInfo) -> None:
        try:
            await self._make_disk_room(info.disk_bytes)
        except NoAdapterRoom:
            await self._shards.drop(info.key, Tier.DISK, info.digest)
            raise

    async def _victim(self, ledger: ByteLedger[K], nbytes: int, is_pinned: Pinned[K]) -> K:
        """Whom to evict next; waits for one. Raises NoAdapterRoom if no eviction could help."""

        def is_hopeless() -> bool:
            return nbytes > ledger.room

        await self.until(lambda: is_hopeless() or ledger.oldest(is_pinned) is not None)
        victim = ledger.oldest(is_pinned)
        if is_hopeless() or victim is None:
            raise NoAdapterRoom(
                f"the adapter takes {nbytes} bytes, more than the {max(0, ledger.room)} of "
                f"{ledger.budget} bytes that pinned adapters leave"
            )
        return victim

    async def _evict_from_disk(self, victim: AdapterKey) -> None:
        self.disk.num_evictions += 1
        self._activity.evicted(victim, Tier.DISK)
        self._forget(victim, None)
        await self._delete(victim)

    async def _delete(self, key: AdapterKey) -> None:
        await shared(self._drops, key, self.drop(key))
