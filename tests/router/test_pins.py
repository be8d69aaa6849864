"""Pins that meet reloads, drops and callers that leave; loads to the device that meet others."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from lorafleet.proto.messages import AdapterKey, Tier
from lorafleet.router.config import RouterConfig
from lorafleet.router.engine import Engine
from lorafleet.router.preload import preload
from tests.fakes import SECRET, FakeConfig, FakeShard
from tests.router.http_service import delete, listed, serving, until
from tests.router.test_adapters import BYTES
from tests.router.test_merged_adapters import MERGE

KEY = AdapterKey("local", "adapter-1")
RELOAD = {"adapter_id": "adapter-1", "reload": True}

pytestmark = pytest.mark.timeout(60)  # what meets must not wait for each other


def pin(tier: str) -> dict[str, str]:
    return {"adapter_id": "adapter-1", "pin": tier}


async def test_a_device_pin_that_a_reload_overtakes_holds_what_is_new() -> None:
    async with serving(FakeConfig(echo=True, host_bytes=4 * BYTES)) as service:
        service.shard.steps.close()  # no copy to the device ends
        pinning = asyncio.create_task(service.json("/v1/adapters", pin("device")))
        await until(lambda: service.engine.stats().num_steps == 1)
        service.shard.contents["adapter-1"] = "new digest"
        await service.json("/v1/adapters", RELOAD)
        service.shard.steps.open()
        pinned = await pinning
        assert (pinned["digest"], pinned["pinned"]) == ("new digest", "device")
        for n in (0, 3, 6, 9):
            await service.generate("a", adapter_id=f"adapter-{n}", max_new_tokens=1)
        held = (await listed(service))["adapter-1"]
        assert (held["tier"], held["pinned"]) == ("device", "device")


async def test_no_pin_outlives_a_drop_that_comes_while_it_is_made() -> None:
    async with serving() as service:
        await service.json("/v1/adapters", {"adapter_id": "adapter-1", "tier": "disk"})
        service.shard.fetching.close()
        pinning = asyncio.create_task(service.json("/v1/adapters", pin("host")))
        await service.shard.saw(lambda: service.shard.fetches[-1].tier is Tier.HOST)
        dropping = asyncio.create_task(service.engine.control.drop(KEY))
        await asyncio.sleep(0)
        service.shard.fetching.open()
        await asyncio.gather(pinning, dropping)
        assert "adapter-1" not in await listed(service)
        assert service.engine.control.pinned(KEY) is Tier.NONE


async def test_an_unpin_during_a_reload_is_not_undone() -> None:
    async with serving() as service:
        await service.json("/v1/adapters", pin("host"))
        service.shard.fetching.close()
        reloading = asyncio.create_task(service.json("/v1/adapters", RELOAD))
        await service.shard.saw(lambda: service.shard.fetches[-1].refresh)
        assert (await service.json("/v1/adapters", pin("none")))["pinned"] is None
        service.shard.fetching.open()
        assert (await reloading)["pinned"] is None


async def test_a_pinned_adapter_is_loaded_after_a_reload_whose_caller_left() -> None:
    async with serving() as service:
        await service.json("/v1/adapters", pin("host"))
        service.shard.contents["adapter-1"] = "new digest"
        service.shard.fetching.close()
        reloading = asyncio.create_task(service.json("/v1/adapters", RELOAD))
        await service.shard.saw(lambda: service.shard.fetches[-1].refresh)
        reloading.cancel()
        await asyncio.gather(reloading, return_exceptions=True)
        service.shard.fetching.open()
        engine = service.engine
        await until(lambda: (held := engine.adapter(KEY)) is not None and held.tier is Tier.HOST)
        held = (await listed(service))["adapter-1"]
        assert (held["digest"], held["pinned"]) == ("new digest", "host")


async def test_a_merge_keeps_its_device_pin_when_a_member_is_reloaded() -> None:
    async with serving() as service:
        pinned = await service.json("/v1/adapters", {"merged_adapters": MERGE, "pin": "device"})
        assert pinned["pinned"] == "device"
        service.shard.contents["adapter-1"] = "new digest"
        await service.json("/v1/adapters", RELOAD)
        await service.generate("abc", merged_adapters=MERGE, max_new_tokens=1)
        key = AdapterKey("merged", pinned["id"])
        await until(lambda: service.engine.control.pinned(key) is Tier.DEVICE)
        held = (await listed(service))[pinned["id"]]
        assert held["digest"] != pinned["digest"]


async def test_what_only_some_may_use_can_be_dropped_from_disk() -> None:
    config = FakeConfig(echo=True, host_bytes=3 * BYTES)
    async with serving(config, adapter_source="hub") as service:
        await service.generate("a", adapter_id="private-1", api_token=SECRET, max_new_tokens=1)
        await service.generate("a", adapter_id="adapter-2", max_new_tokens=1)
        assert "private-1" not in await listed(service), "it has left host memory"
        status, answer = await delete(service, "/v1/adapters/private-1")
        assert status == 200, answer
        assert (await delete(service, "/v1/adapters/private-1"))[0] == 404


async def test_two_loads_to_the_device_and_a_request_share_the_only_slot() -> None:
    async with serving(FakeConfig(num_slots=1)) as service:
        for _ in range(10):
            await asyncio.gather(
                service.generate("a", adapter_id="adapter-0", max_new_tokens=2),
                service.json("/v1/adapters", {"adapter_id": "adapter-3", "tier": "device"}),
                service.json("/v1/adapters", {"adapter_id": "adapter-6", "tier": "device"}),
            )


async def test_more_adapters_are_preloaded_than_there_are_slots() -> None:
    async with serving(FakeConfig(num_slots=2)) as service:
        names = tuple(f"adapter-{n}" for n in range(9))
        config = RouterConfig(adapter_source="local", preloaded_adapter_ids=names)
        await preload(service.engine, config)
        assert all(held["pinned"] == "host" for held in (await listed(service)).values())


async def test_a_rank_that_is_behind_does_not_need_what_was_evicted_again() -> None:
    config, moved = FakeConfig(num_shard=2), AdapterKey("local", "adapter-3")
    with FakeShard(config) as one, FakeShard(replace(config, rank=1)) as two:
        engine = await Engine.start(RouterConfig(shards=(one.address, two.address)))
        try:
            two.steps.close()
            await engine.control.load(AdapterKey("local", "adapter-0"), "", Tier.DEVICE)
            await engine.control.load(moved, "", Tier.DEVICE)  # its plan is not read by rank 1
            await engine.control.drop(moved)
            two.steps.open()
            await two.saw(lambda: len(two.plans) == len(one.plans))
            await engine.control.load(moved, "", Tier.DEVICE)
            assert not engine.failed.is_set(), engine.failure
        finally:
            await engine.close()
