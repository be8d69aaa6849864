"""Engine: the loop between the scheduler and the shards, and the door for requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from itertools import count
from typing import Any

from lorafleet.cache.residency import ByteLedger
from lorafleet.proto.messages import (
    AdapterInfo,
    AdapterKey,
    AdapterTokenizer,
    ShardInfo,
    StepPlan,
    Tier,
)
from lorafleet.router.access import AccessMemory
from lorafleet.router.activity import Activity
from lorafleet.router.adapter import Adapter, AdapterHold, AdapterPin, AdapterStatus, num_tokens
from lorafleet.router.adapters import AdapterDirectory
from lorafleet.router.config import RouterConfig
from lorafleet.router.control import AdapterControl
from lorafleet.router.deadline import NEVER, Deadline
from lorafleet.router.errors import InvalidRequest, RequestError, ShardLost
from lorafleet.router.failure_memory import FailureMemory
from lorafleet.router.generation import Generation
from lorafleet.router.queue_limit import QueueLimit
from lorafleet.router.request import GenerationRequest, TokenEvent
from lorafleet.router.scheduler import Scheduler, SchedulerLimits
from lorafleet.router.sequence import Sequence
from lorafleet.router.shards import ShardGroup
from lorafleet.router.stats import EngineStats, TierStats

log = logging.getLogger(__name__)

# A step is sent before the result of the one before it is read, so the shards never wait for us.
MAX_PLANS_IN_FLIGHT = 2


class Engine:
    """Serves generations on one shard group. `Engine.start` makes one; `close` ends it.

    `failed` is set, and `failure` says why, once the group is lost: no generation goes on, none
    can be submitted, and the process should end.
    """

    def __init__(
        self,
        shards: ShardGroup,
        limits: SchedulerLimits,
        activity: Activity | None = None,
        failures: FailureMemory | None = None,
        access: AccessMemory | None = None,
        max_waiting: int = 0,
    ) -> None:
        """`max_waiting`: requests of one adapter that may wait, 0 = any number."""
        self.info: ShardInfo = shards.info
        self.failed = asyncio.Event()
        self.failure: ShardLost | None = None
        self._shards = shards
        self.activity = activity or Activity()
        self._scheduler = Scheduler(shards.info, limits, self._on_loaded, self._on_evicted)
        device = self._scheduler.device
        self._directory = AdapterDirectory(
            shards, device.ledger.capacity, device.forget, self.activity, failures, access
        )
        self._generations: dict[Sequence, Generation] = {}
        self._queue_limit = QueueLimit(max_waiting, self._count_waiting, self._waited)
        self._tickets = count()
        self._work = asyncio.Event()  # the loop has something to look at
        self.control = AdapterControl(self._directory, device, self._work.set)
        self._adapters_in_steps: deque[int] = deque(maxlen=1024)
        shards.lost.add_done_callback(lambda _: self._work.set())
        self._loop = asyncio.create_task(self._run())

    @classmethod
    async def start(cls, config: RouterConfig) -> Engine:
        """Connects to `config.shards` and starts serving.

        Raises ShardLost if a shard is not ready in time, ValueError if they are not one group.
        """
        shards = await ShardGroup.connect(config.shards, config.shard_connect_seconds)
        limits = SchedulerLimits(
            config.prefill_chunk_tokens,
            config.prefix_caching,
            max_running=config.max_running_per_adapter,
            ageing_seconds=config.priority_ageing_seconds,
        )
        activity = Activity(config.metrics_max_adapters)
        failures = FailureMemory(config.adapter_failure_seconds)
        access = AccessMemory(config.adapter_access_ttl)
        engine = cls(shards, limits, activity, failures, access, config.max_waiting_per_adapter)
        try:
            await engine._directory.start()
        except BaseException:
            await engine.close()
            raise
        return engine

    async def close(self) -> None:
        """Ends every generation with ShardLost and disconnects."""
        self._loop.cancel()
        await asyncio.gather(self._loop, return_exceptions=True)
        self._end_all(ShardLost("the service is shutting down"))
        await self.control.close()
        await self._directory.close()
        await self._shards.close()

    async def hold(
        self, key: AdapterKey | None, api_token: str = "", deadline: Deadline = NEVER
    ) -> AdapterHold:
        """Fetches an adapter and keeps it for requests to come, until the hold is closed.

        Raises what `submit` raises for adapters and full queues.
        """
        asked_at = time.monotonic()
        self._check_alive()
        with self._queue_limit.enter(key):
            if key is None:
                return AdapterHold()
            pin = await self._acquire(key, api_token, deadline)
        return AdapterHold(pin, time.monotonic() - asked_at)

    async def tokenizer(self, key: AdapterKey) -> AdapterTokenizer:
        """What an adapter that is held ships of a tokenizer. Raises AdapterError or ShardLost."""
        return await self._shards.tokenizer(key)

    async def submit(
        self, request: GenerationRequest, hold: AdapterHold | None = None
    ) -> Generation:
        """Queues a request, with its adapter, which is fetched unless the caller holds it.

        Raises InvalidRequest for sizes this group cannot hold, AdapterError or Overloaded for what
        an adapter's fetch or a full queue can say, DeadlineExceeded, ShardLost.
        """
        self._check_sizes(request)
        self._check_alive()
        if hold is None:
            hold = await self.hold(request.adapter, request.api_token, request.deadline)
            pin = hold.pin
        else:
            pin = hold.adapter.pin() if hold.adapter is not None else None
        try:
            self._check_alive()
            self._check_ids(request, hold.adapter)
            with self._queue_limit.enter(request.adapter):
                pass  # others may have come since the hold was asked for
        except BaseException:
            if pin is not None:
                pin.close()
            raise
        submitted_at = time.monotonic() - hold.seconds
        sequence = Sequence(next(self._tickets), request, hold.adapter, submitted_at)
        generation = Generation(sequence, pin, self._abort)
        self._generations[sequence] = generation
        self._scheduler.submit(sequence)
        self._work.set()
        return generation

    async def _acquire(self, key: AdapterKey, api_token: str, deadline: Deadline) -> AdapterPin:
        tier = self._tier(key)
        try:
            async with asyncio.timeout_at(deadline.when):
                pin = await self._directory.acquire(key, api_token)
        except TimeoutError:
            raise deadline.error() from None
        # Only now, so that what does not exist has no metrics.
        self.activity.looked_up(key, tier)
        try:
            self.control.follow(pin.adapter)
            self.control.check_device_room(pin.adapter)
        except BaseException:
            pin.close()
            raise
        return pin

    async def adapters(self) -> list[AdapterInfo]:
        """Adapters the shards can serve without a remote source. Raises ShardLost."""
        return [info for info in await self._shards.list_adapters() if info.is_public]

    async def all_adapters(self) -> list[AdapterStatus]:
        """Those, and what was loaded with some caller's token; by source and id."""
        infos = await self.adapters()
        known = {adapter.key: self._status(adapter) for adapter in self._directory}
        host = self._directory.tiers.host
        for info in infos:
            # What a shard said of its host memory is over if the ledger does not know of it.
            tier = info.tier if info.content in host else Tier.DISK
            pinned = self.control.pinned(info.key)
            known.setdefault(info.key, AdapterStatus(info.key, info, tier, pinned=pinned))
        return [known[key] for key in sorted(known, key=lambda key: (key.source, str(key)))]

    async def holds(self, key: AdapterKey) -> bool:
        """Whether any tier has an adapter, if only for some callers. Raises ShardLost."""
        if self._directory.find(key) is not None:
            return True
        return any(info.key == key for info in await self._shards.list_adapters())

    def adapter(self, key: AdapterKey) -> AdapterStatus | None:
        """Where an adapter is; None if no request and no operator has asked for it."""
        adapter = self._directory.find(key)
        return self._status(adapter) if adapter is not None else None

    def stats(self) -> EngineStats:
        """Gauges and counters now."""
        scheduler, tiers = self._scheduler, self._directory.tiers
        kv, device = scheduler.kv, scheduler.device.ledger
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            used_pages=kv.pages.num_used,
            free_pages=kv.pages.num_free + kv.pages.num_idle,
            cached_pages=kv.pages.num_idle,
            num_steps=scheduler.num_steps,
            num_preemptions=scheduler.num_preemptions,
            num_prefix_query_tokens=kv.num_query_tokens,
            num_prefix_hit_tokens=kv.num_hit_tokens,
            num_page_evictions=kv.prefix.num_evictions,
            max_adapters_in_step=max(self._adapters_in_steps, default=0),
            tiers={
                Tier.DISK: _tier_stats(tiers.disk),
                Tier.HOST: _tier_stats(tiers.host),
                Tier.DEVICE: TierStats(device.used_bytes, device.capacity, device.num_evictions),
            },
            adapters=[self._status(adapter) for adapter in self._directory],
        )

    def check(self) -> None:
        """Asserts that every ledger balances and that nothing is held when nothing runs."""
        scheduler = self._scheduler
        scheduler.check()
        self._directory.check(is_idle=not self._generations and not scheduler.device.num_loading)
        held = len(scheduler.running) + len(scheduler.waiting)
        assert held == len(self._generations), "a sequence is lost"
        if not self._generations:
            assert scheduler.kv.pages.num_used == 0, "pages are held by nobody"

    async def _run(self) -> None:
        try:
            while True:
                await self._step()
        except ShardLost as error:
            self._fail(error)
        except Exception as error:
            log.exception("the engine loop failed at step %d", self._scheduler.num_steps)
            self._fail(ShardLost(f"the router's engine failed: {error}"))

    async def _step(self) -> None:
        """Sends what can be sent, then takes in one result or waits for work."""
        scheduler = self._scheduler
        while scheduler.num_in_flight < MAX_PLANS_IN_FLIGHT:
            plan = scheduler.plan(time.monotonic())
            if plan is None:
                break
            self._adapters_in_steps.append(_num_adapters(plan))
            await self._shards.send(plan)
        if scheduler.num_in_flight:
            result = await self._shards.receive()
            for sequence, event in scheduler.apply(result, time.monotonic()):
                self._publish(sequence, event)
            return
        if self._shards.lost.done():
            raise self._shards.lost.result()
        assert not scheduler.waiting, "sequences wait and nothing is in flight"
        self._work.clear()
        await self._work.wait()

    def _publish(self, sequence: Sequence, event: TokenEvent | RequestError) -> None:
        generation = self._generations[sequence]
        if isinstance(event, TokenEvent):
            generation.push(event)
            if event.finish is None:
                return
        else:
            generation.fail(event)
        del self._generations[sequence]

    def _abort(self, sequence: Sequence) -> None:
        self._scheduler.abort(sequence)
        self._generations.pop(sequence, None)

    def _fail(self, error: ShardLost) -> None:
        self._end_all(error)
        self.failed.set()

    def _end_all(self, error: ShardLost) -> None:
        self.failure = self.failure or error
        for sequence, generation in list(self._generations.items()):
            self._abort(sequence)
            generation.fail(self.failure)

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _check_ids(self, request: GenerationRequest, adapter: Adapter | None) -> None:
        vocab_size = num_tokens(self.info, adapter)
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < vocab_size:
            raise InvalidRequest(
                f"inputs must have token ids between 0 and {vocab_size - 1}", "inputs"
            )

    def _check_sizes(self, request: GenerationRequest) -> None:
        info = self.info
        num_prompt, num_new = len(request.prompt_ids), request.max_new_tokens
        if num_prompt < 1:
            raise InvalidRequest("inputs must have at least 1 token", "inputs")
        if num_new < 1:
            raise InvalidRequest(
                f"max_new_tokens must be at least 1, got {num_new}", "max_new_tokens"
            )
        num_cached = info.num_pages * info.page_size
        # The last token is never computed on, so it takes no place in the KV cache.
        limit = min(info.max_model_len, num_cached + 1)
        if num_prompt + num_new > limit:
            raise InvalidRequest(
                f"inputs ({num_prompt} tokens) and max_new_tokens ({num_new}) together must be "
                f"at most {limit} tokens (the model takes {info.max_model_len}, "
                f"the KV cache holds {num_cached})",
                "max_new_tokens",
            )

    def _count_waiting(self, key: AdapterKey | None) -> int:
        adapters = self._directory.contents_of(key) if key is not None else [None]
        return sum(map(self._scheduler.waiting.count, adapters))

    def _waited(self, key: AdapterKey | None) -> float:
        adapter = self._directory.find(key) if key is not None else None
        oldest = self._scheduler.waiting.oldest(adapter)
        return time.monotonic() - oldest.submitted_at if oldest is not None else 0.0

    def _status(self, adapter: Adapter) -> AdapterStatus:
        slot = self._scheduler.device.slot_of(adapter)
        held = Tier.HOST if adapter.in_host else Tier.DISK
        tier = Tier.DEVICE if slot else held
        pinned = self.control.pinned(adapter.key)
        return AdapterStatus(adapter.key, adapter.info, tier, slot, pinned, adapter.num_pins)

    def _tier(self, key: AdapterKey) -> Tier:
        """The highest tier that holds an adapter."""
        adapter = self._directory.find(key)
        if adapter is not None:
            return self._status(adapter).tier
        return Tier.DISK if key in self._directory.tiers.disk else Tier.NONE

    def _on_loaded(self, adapter: Adapter, seconds: float) -> None:
        self.activity.loaded(adapter.key, Tier.DEVICE, seconds)

    def _on_evicted(self, adapter: Adapter) -> None:
        self.activity.evicted(adapter.key, Tier.DEVICE)


def _tier_stats(ledger: ByteLedger[Any]) -> TierStats:
    return TierStats(ledger.used, ledger.budget, ledger.num_evictions)


def _num_adapters(plan: StepPlan) -> int:
    return len(set(plan.slots) - {0})
