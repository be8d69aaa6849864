"""AdapterDirectory: brings adapters into the shards' host memory and keeps the tiers in budget."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from lorafleet.cache.merging.recipe import members_of
from lorafleet.proto.messages import AdapterContent, AdapterInfo, AdapterKey
from lorafleet.router.access import AccessMemory
from lorafleet.router.activity import Activity
from lorafleet.router.adapter import Adapter, AdapterPin
from lorafleet.router.callers import Caller, Callers
from lorafleet.router.errors import AdapterChanged, AdapterUnservable
from lorafleet.router.failure_memory import FailureMemory
from lorafleet.router.shards import ShardGroup
from lorafleet.router.superseded import Superseded
from lorafleet.router.tasks import all_of, shared
from lorafleet.router.tiers import HostAndDisk

_MAX_CHANGES = 3  # of an adapter's content, between one look at it and its load


class AdapterDirectory:
    """Owns what each adapter's content is, and who is waiting for it.

    An adapter reaches host memory in two moves: fetched to disk, which validates and sizes it;
    then, once there is room, packed into host memory. Concurrent requests share both, and a failure
    is remembered for a while. An adapter that leaves host memory is forgotten, so the next request
    for it validates it again. One that is reloaded with other content is another Adapter from then
    on; requests that began with the older one end with it.
    """

    def __init__(
        self,
        shards: ShardGroup,
        arena_bytes: int,
        on_dropped: Callable[[Adapter], None],
        activity: Activity | None = None,
        failures: FailureMemory | None = None,
        access: AccessMemory | None = None,
    ) -> None:
        self._shards = shards
        self._failures = FailureMemory() if failures is None else failures
        self._access = AccessMemory() if access is None else access
        self._arena_bytes = arena_bytes
        self._on_dropped = on_dropped  # called before an adapter's host copy goes
        self._adapters: dict[AdapterKey, Adapter] = {}
        self._private: set[AdapterKey] = set()  # known only through some caller's token
        self._num_changes = Counter[AdapterKey]()  # seen of adapters that are no merges
        self._claims = Counter[AdapterKey]()  # requests in `acquire`, whose disk copy must stay
        # A token is part of a check's identity, so that nobody profits from another's access.
        self._checks: dict[Caller, asyncio.Task[Adapter]] = {}
        self._callers = Callers()
        self._reloads: dict[AdapterKey, asyncio.Task[Adapter]] = {}
        self._loads: dict[Adapter, asyncio.Task[None]] = {}
        self._removals: dict[AdapterKey, asyncio.Task[None]] = {}
        self.tiers = HostAndDisk(
            shards,
            self._is_host_pinned,
            self._is_disk_pinned,
            self._forget,
            activity or Activity(),
        )
        self._superseded = Superseded(self.tiers, on_dropped)

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._adapters.values())

    async def acquire(self, key: AdapterKey, api_token: str) -> AdapterPin:
        """Brings an adapter into host memory and pins it there.

        A request with a token, or for an adapter someone's token fetched, has its own access
        checked by the shards, unless they did so a short time ago. Raises AdapterError, Overloaded
        or ShardLost.
        """
        made_of = await self._members_validated(key, api_token)
        with self._claimed(key):
            pin = await self._pinned(key, api_token, made_of)
        members = (self._adapters.get(member) for member in members_of(key))
        for used in (*members, pin.adapter):
            if used is not None:
                self.tiers.touch(used.content)
        self._failures.succeeded(key, api_token)
        return pin

    async def validate(self, key: AdapterKey, api_token: str) -> Adapter:
        """Brings an adapter to disk, checked and sized. Raises what `acquire` does."""
        made_of = await self._members_validated(key, api_token)
        with self._claimed(key):
            return await self._validated(key, api_token, made_of)

    async def reload(self, key: AdapterKey, api_token: str) -> Adapter:
        """Reads an adapter's source again, of a merged one its members' sources.

        Requests from now on get what is there, those that have begun end with what they began
        with. After an error requests get what host memory has, as before. Raises what `acquire`
        does.
        """
        await all_of(self.reload(member, api_token) for member in members_of(key))
        made_of = await self._members_validated(key, api_token)
        with self._claimed(key):
            while key in self._reloads:  # it may have looked before the change of this one's caller
                await asyncio.wait([self._reloads[key]])
            check = self._check(key, api_token, made_of, refresh=True)
            return await shared(self._reloads, key, check)

    async def retired(self, adapter: Adapter) -> None:
        """Returns once nothing is left of an adapter that a reload has replaced."""
        await self.tiers.until(lambda: self._superseded.find(adapter.content) is not adapter)

    async def drop(self, key: AdapterKey) -> None:
        """Frees every tier once the requests that use the adapter have ended, also if cancelled.

        Requests for it that come meanwhile wait and fetch it anew. Raises ShardLost.
        """
        self.tiers.unkeep(key)
        await shared(self._removals, key, self._remove(key))

    def in_use(self) -> list[Adapter]:
        """Adapters that requests or copies under way use, older contents too."""
        return [adapter for adapter in (*self, *self._superseded) if adapter.is_pinned]

    def contents_of(self, key: AdapterKey) -> list[Adapter]:
        """The adapter, if it is known, and older contents that are still in use."""
        adapter = self._adapters.get(key)
        older = [adapter for adapter in self._superseded if adapter.key == key]
        return older if adapter is None else [adapter, *older]

    def find(self, key: AdapterKey) -> Adapter | None:
        """The adapter, if it is known: in host memory, or on its way there."""
        return self._adapters.get(key)

    async def start(self) -> None:
        """Counts what the shards hold from before."""
        await self.tiers.start()

    async def close(self) -> None:
        """Cancels fetches under way."""
        tasks = [*self._checks.values(), *self._reloads.values(), *self._loads.values()]
        tasks += self._removals.values()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, self._superseded.close(), return_exceptions=True)

    def check(self, is_idle: bool) -> None:
        """Asserts that the tiers balance and, when no request is there, that nothing is pinned."""
        self.tiers.check()
        if is_idle and not self._loads:
            assert not self.in_use(), "a pin was not closed"

    @contextmanager
    def _claimed(self, key: AdapterKey) -> Iterator[None]:
        self._claims[key] += 1
        try:
            yield
        finally:
            self._claims[key] -= 1
            if not self._claims[key]:
                del self._claims[key]
                self.tiers.wake()

    async def _members_validated(self, key: AdapterKey, api_token: str) -> tuple[str, ...]:
        """The digests of a merged adapter's members; returns when no drop is in the way.

        Nothing is claimed meanwhile, since members may have to wait for disk room.
        """
        found = await all_of(self.validate(member, api_token) for member in members_of(key))
        while key in self._removals:
            await asyncio.shield(self._removals[key])
        return tuple(member.info.digest for member in found)

    async def _remove(self, key: AdapterKey) -> None:
        await self.tiers.until(lambda: not self._is_disk_pinned(key))
        # Whoever asked for these is gone, and they would bring the adapter back.
        checks = [task for (checked, _), task in self._checks.items() if checked == key]
        reloads = [task for checked, task in self._reloads.items() if checked == key]
        await asyncio.gather(*checks, *reloads, return_exceptions=True)
        self.tiers.unkeep(key)  # by a pin that was on its way
        self._forget(key)
        self._failures.forget(key)
        self._access.forget(key)
        await self.tiers.drop(key)

    async def _pinned(
        self, key: AdapterKey, api_token: str, made_of: tuple[str, ...]
    ) -> AdapterPin:
        """In host memory and pinned. Content that changes on the way there is validated again."""
        for _ in range(_MAX_CHANGES):
            pin = (await self._validated(key, api_token, made_of)).pin()
            try:
                await self._loaded(pin.adapter, api_token)
                return pin
            except AdapterChanged:
                pin.close()
            except BaseException:
                pin.close()
                raise
        raise AdapterUnservable(f"adapter {key} keeps changing while it is loaded")

    async def _validated(
        self, key: AdapterKey, api_token: str, made_of: tuple[str, ...]
    ) -> Adapter:
        for _ in range(_MAX_CHANGES):
            adapter = self._adapters.get(key)
            # What shards hold of a merge that is not known here was made of nobody knows what.
            is_outdated = made_of != (adapter.made_of if adapter is not None else ())
            if adapter is not None and not is_outdated and not self._must_ask(key, api_token):
                return adapter
            self._failures.check(key, api_token)
            check = self._check(key, api_token, made_of, refresh=is_outdated)
            with suppress(AdapterChanged):
                return await shared(self._checks, self._callers.of(key, api_token), check)
        raise AdapterUnservable(f"adapter {key} keeps changing, or is another on each shard")

    def _must_ask(self, key: AdapterKey, api_token: str) -> bool:
        """Whether it takes the source's word that this caller may use a known adapter.

        Of a merged one, its members' sources have given theirs.
        """
        if members_of(key) or not (api_token or key in self._private):
            return False
        return not self._access.allows(key, api_token)

    async def _check(
        self, key: AdapterKey, api_token: str, made_of: tuple[str, ...], refresh: bool
    ) -> Adapter:
        with self._claimed(key):  # whoever asked for this may have gone away
            return await self._checked(key, api_token, made_of, refresh)

    async def _checked(
        self, key: AdapterKey, api_token: str, made_of: tuple[str, ...], refresh: bool
    ) -> Adapter:
        known, num_changes = self._adapters.get(key), self._num_changes[key]
        digest = known.info.digest if known is not None and not refresh else ""
        try:
            with self._failures.watch(key, api_token), self._access.watch(key, api_token):
                info = await self.tiers.fetch_to_disk(key, api_token, refresh, digest)
                self._refuse_too_large(info)
                if not refresh and self._num_changes[key] != num_changes:
                    raise AdapterChanged(f"adapter {key} was reloaded meanwhile")  # ask again
                is_new = refresh or (known is not None and info.content != known.content)
                if is_new:  # whoever had access may have lost it with the change
                    self._access.forget(key)
                    self._failures.forget(key)
                    if not made_of:
                        self._num_changes[key] += 1
        finally:
            await self._delete_uncounted(members_of(key))
        if not api_token:
            self._private.discard(key)
        elif (is_new or key not in self._adapters) and not made_of:
            self._private.add(key)
        adapter = self._adapters.get(key)
        if adapter is None or adapter.content != info.content:
            adapter = self._put(info)
        adapter.made_of = made_of
        return adapter

    def _put(self, info: AdapterInfo) -> Adapter:
        """The adapter with this content, in the place of what was known."""
        key = info.key
        if (before := self._adapters.get(key)) is not None:
            self._superseded.add(before)
        adapter = self._superseded.take(info.content) or Adapter(info, self.tiers.wake)
        self._adapters[key] = adapter
        if self.tiers.is_kept(key):
            self.tiers.keep(adapter.content)
        return adapter

    def _refuse_too_large(self, info: AdapterInfo) -> None:
        limits = {
            "adapter-host-bytes": self._shards.info.host_bytes,
            "adapter-device-bytes": self._arena_bytes,
        }
        for flag, limit in limits.items():
            if info.packed_bytes > limit:
                raise AdapterUnservable(
                    f"adapter {info.key} takes {info.packed_bytes} bytes on a shard, "
                    f"more than the {limit} bytes --{flag} gives"
                )

    async def _loaded(self, adapter: Adapter, api_token: str) -> None:
        if not adapter.in_host:
            await shared(self._loads, adapter, self._load(adapter, api_token))

    async def _load(self, adapter: Adapter, api_token: str) -> None:
        pin = adapter.pin()  # its own, because the requests that wait for it may go away
        try:
            # It may have been evicted since it was validated, or superseded.
            if self._adapters.setdefault(adapter.key, adapter) is not adapter:
                raise AdapterChanged(f"adapter {adapter.key} is another by now")
            with self._failures.watch(adapter.key, api_token):
                await self.tiers.load_to_host(adapter.content, adapter.nbytes, api_token)
            adapter.in_host = True
        except BaseException:
            if self._adapters.get(adapter.key) is adapter:
                del self._adapters[adapter.key]
            raise
        finally:
            pin.close()
            await self._delete_uncounted(members_of(adapter.key))

    async def _delete_uncounted(self, members: Iterable[AdapterKey]) -> None:
        for member in members:
            if not self._is_disk_pinned(member):  # else whoever fetches it counts it
                await self.tiers.delete_uncounted(member)

    def _forget(self, key: AdapterKey, content: AdapterContent | None = None) -> None:
        """The adapter's copies go, or those of one content: superseded ones look to themselves."""
        adapter = self._adapters.get(key)
        if adapter is None or content not in (None, adapter.content):
            return
        del self._adapters[key]
        self._private.discard(key)
        adapter.in_host = False
        self._on_dropped(adapter)

    def _is_host_pinned(self, content: AdapterContent) -> bool:
        adapter = self._adapters.get(content.key)
        if adapter is None or adapter.content != content:
            adapter = self._superseded.find(content)
        return adapter is not None and adapter.is_pinned

    def _is_disk_pinned(self, key: AdapterKey) -> bool:
        adapter = self._adapters.get(key)
        is_pinned = adapter is not None and adapter.is_pinned
        return is_pinned or self._claims[key] > 0 or self._superseded.is_pinned(key)
