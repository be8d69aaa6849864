"""AdapterControl: what an operator asks of adapters, beyond what requests do by themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from lorafleet.proto.messages import AdapterKey, Tier
from lorafleet.router.adapter import Adapter
from lorafleet.router.adapters import AdapterDirectory
from lorafleet.router.device import DeviceSlots
from lorafleet.router.errors import NoAdapterRoom


class AdapterControl:
    """Loads, pins and drops. Pins are owned by the ledgers of their tiers."""

    def __init__(
        self, directory: AdapterDirectory, device: DeviceSlots, wake: Callable[[], None]
    ) -> None:
        """`wake` makes the engine's loop look for work."""
        self._directory, self._device, self._wake = directory, device, wake
        self._on_device: dict[AdapterKey, Adapter] = {}  # whose slots are pinned
        self._tasks: set[asyncio.Task[None]] = set()

    async def load(self, key: AdapterKey, api_token: str, tier: Tier) -> None:
        """Raises an adapter to a tier at least; it may be evicted again.

        Raises AdapterError, Overloaded or ShardLost, as a request for it would.
        """
        if tier is Tier.DISK:
            await self._directory.validate(key, api_token)
            return
        with await self._directory.acquire(key, api_token) as pin:
            self.check_device_room(pin.adapter)
            if tier is Tier.DEVICE:
                await self._to_device(pin.adapter)

    async def pin(self, key: AdapterKey, api_token: str, tier: Tier) -> None:
        """Loads an adapter and keeps it in host memory, for DEVICE on the device as well.

        Raises NoAdapterRoom, before anything is evicted, when other pins and the adapters of
        requests under way do not leave room for it, and whatever `load` raises.
        """
        self._check_room(await self._directory.validate(key, api_token), tier)
        while not await self._pin(key, api_token, tier):
            pass

    async def _pin(self, key: AdapterKey, api_token: str, tier: Tier) -> bool:
        """False, with nothing pinned, if a reload has made it another adapter meanwhile."""
        with await self._directory.acquire(key, api_token) as pin:
            self._check_room(pin.adapter, tier)
            if tier is Tier.DEVICE:
                await self._keep_on_device(pin.adapter)
            else:
                self._device.ledger.unkeep(pin.adapter)
            if self._directory.find(key) is not pin.adapter:
                self._device.ledger.unkeep(pin.adapter)
                return False
            self._directory.tiers.keep(pin.adapter.content)
            self._on_device.pop(key, None)
            if tier is Tier.DEVICE:
                self._on_device[key] = pin.adapter
            return True

    def follow(self, adapter: Adapter) -> None:
        """A request got this adapter: if it was made anew, it takes over a pin of the device."""
        before = self._on_device.get(adapter.key)
        if before is None or before is adapter or not self._directory.tiers.is_kept(adapter.key):
            return
        self._on_device[adapter.key] = adapter
        self._device.ledger.unkeep(before)
        self._start(self._follow(adapter))

    async def _follow(self, adapter: Adapter) -> None:
        with adapter.pin(), suppress(NoAdapterRoom):
            self._check_room(adapter, Tier.DEVICE)
            await self._keep_on_device(adapter)
            if self._on_device.get(adapter.key) is not adapter:
                self._device.ledger.unkeep(adapter)

    async def reload(self, key: AdapterKey, api_token: str) -> None:
        """Has requests from now on get what the adapter's source has now; pins stay.

        Requests that have begun end with what they began with, and nobody waits for them but a pin
        that finds no room beside them. Goes on if the caller leaves, since what is pinned must be
        loaded. Raises what `load` and `pin` do.
        """
        await asyncio.shield(self._start(self._reload(key, api_token)))

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen, even if the caller has gone

    async def _reload(self, key: AdapterKey, api_token: str) -> None:
        before, pinned = self._directory.find(key), self.pinned(key)
        adapter = await self._directory.reload(key, api_token)
        if before is not None and adapter is not before:
            self._device.ledger.unkeep(before)
        if not pinned or not self._directory.tiers.is_kept(key):  # unpinned or dropped meanwhile
            return
        try:
            await self.pin(key, api_token, pinned)
        except NoAdapterRoom:
            if before is None or before is adapter:
                raise
            await self._directory.retired(before)
            if self._directory.tiers.is_kept(key):
                await self.pin(key, api_token, pinned)

    def unpin(self, key: AdapterKey) -> None:
        """Ends a pin; nothing if there is none."""
        self._directory.tiers.unkeep(key)
        self._on_device.pop(key, None)
        adapter = self._directory.find(key)
        if adapter is not None:
            self._device.ledger.unkeep(adapter)
            self._wake()

    def pinned(self, key: AdapterKey) -> Tier:
        """The highest tier an adapter is pinned in, NONE without a pin."""
        if not self._directory.tiers.is_kept(key):
            return Tier.NONE
        adapter = self._directory.find(key)
        slot = self._device.ledger.find(adapter) if adapter is not None else None
        return Tier.DEVICE if slot is not None and slot.is_kept else Tier.HOST

    async def drop(self, key: AdapterKey) -> None:
        """Frees every tier, pinned or not, once the requests that use the adapter have ended."""
        self._on_device.pop(key, None)
        await self._directory.drop(key)

    async def close(self) -> None:
        """Cancels what goes on without its caller."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def check_device_room(self, adapter: Adapter) -> None:
        """Raises NoAdapterRoom if the adapter can never be on the device because of pins."""
        room = self._device.ledger.room(adapter.piece_bytes)
        if adapter.nbytes > room and self._device.ledger.find(adapter) is None:
            raise NoAdapterRoom(
                f"adapter {adapter.key} takes {adapter.nbytes} bytes on the device, more than the "
                f"{room} that pinned adapters leave it"
            )

    def _check_room(self, adapter: Adapter, tier: Tier) -> None:
        """Raises NoAdapterRoom unless the pin leaves room for what requests under way use."""
        tiers, slots = self._directory.tiers, self._device.ledger
        in_use = [a for a in self._directory.in_use() if a is not adapter]
        if not tiers.is_kept(adapter.key):
            needed = max((a.nbytes for a in in_use if not tiers.host.is_kept(a.content)), default=0)
            _check("host memory", adapter, needed, tiers.host.room)
        slot = slots.find(adapter)
        if tier is Tier.DEVICE and not (slot and slot.is_kept):
            others = self._without_place(in_use)
            needed = max((a.nbytes for a in others), default=0)
            piece = max(a.piece_bytes for a in [adapter, *others])
            _check("the device", adapter, needed, slots.room(piece))

    def _without_place(self, adapters: list[Adapter]) -> list[Adapter]:
        """Those that do not have a place of their own on the device."""
        slots = (self._device.ledger.find(adapter) for adapter in adapters)
        pairs = zip(adapters, slots, strict=True)
        return [adapter for adapter, slot in pairs if not (slot and slot.is_kept)]

    async def _keep_on_device(self, adapter: Adapter) -> None:
        await self._to_device(adapter, lambda: self._keep_slot(adapter))

    def _keep_slot(self, adapter: Adapter) -> None:
        slots = self._device.ledger
        slots.keep(adapter)
        # Where the slot lies was not known before: it may cut the rest in pieces.
        in_use = [a for a in self._directory.in_use() if a is not adapter]
        if any(a.nbytes > slots.room(a.piece_bytes) for a in self._without_place(in_use)):
            slots.unkeep(adapter)
            raise NoAdapterRoom(
                f"pinning {adapter.key} on the device would cut what is left into pieces too short "
                "for an adapter of a request under way; try again"
            )

    async def _to_device(self, adapter: Adapter, act: Callable[[], None] = lambda: None) -> None:
        """Returns once the adapter, whose host copy the caller has pinned, has been on the device.

        `act` is called there and then: the next plan may give its slot to another.
        """
        arrived = asyncio.get_running_loop().create_future()

        def arrive() -> None:
            if arrived.done():  # the caller has gone
                return
            try:
                act()
                arrived.set_result(None)
            except NoAdapterRoom as error:
                arrived.set_exception(error)

        self._device.ask(adapter, arrive)
        self._wake()
        await arrived


def _check(place: str, adapter: Adapter, needed: int, room: int) -> None:
    if adapter.nbytes + needed > room:
        others = f", of which requests under way need {needed}" if needed else ""
        raise NoAdapterRoom(
            f"pinning {adapter.key} takes {adapter.nbytes} bytes of {place} on a shard; pins leave "
            f"{max(0, room)}{others}"
        )
