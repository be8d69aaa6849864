"""Reloads: what requests get before, meanwhile and after, and what is counted of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import grpc
import pytest

from lorafleet.proto.messages import (
    AdapterInfo,
    AdapterTokenizer,
    DropAdapterRequest,
    FetchAdapterRequest,
    Tier,
)
from lorafleet.router.errors import AdapterForbidden, AdapterUnservable, SourceUnavailable
from tests.fakes import SECRET, FakeConfig, FakeShard
from tests.router.http_service import serving, until
from tests.router.test_adapters import BYTES, directory_of, fetched, hub, local
from tests.router.test_merged_adapters import merge_of


class Turning(FakeShard):
    """A source that becomes private, or does not answer when it is asked again."""

    is_private = False
    is_down = False
    is_bad = False

    def _find(self, request: FetchAdapterRequest, context: Any) -> AdapterInfo:
        if self.is_down and request.refresh:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the hub does not answer")
        if self.is_bad and request.refresh:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "lora_A is not finite")
        if self.is_private and request.api_token != SECRET:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "no access")
        return super()._find(request, context)


async def test_a_reload_is_for_requests_from_then_on() -> None:
    key = hub("adapter-1")
    with FakeShard() as shard:
        async with directory_of(shard) as (directory, dropped):
            old = await directory.acquire(key, "")
            directory.tiers.keep(old.adapter.content)
            assert await directory.reload(key, "") is old.adapter
            shard.contents["adapter-1"] = "new digest"
            same = await directory.acquire(key, "any token")
            assert same.adapter is old.adapter  # until it is reloaded
            reloaded = await directory.reload(key, "")
            new = await directory.acquire(key, "any token")
            assert new.adapter is reloaded is not old.adapter
            assert new.adapter.info.digest == "new digest"
            held = {old.adapter.content, new.adapter.content}
            assert set(directory.tiers.host) == held
            assert directory.in_use() == [new.adapter, old.adapter]
            assert directory.tiers.host.room == directory.tiers.host.budget - new.adapter.nbytes
            for pin in (same, new):
                pin.close()
            assert dropped == []
            old.close()
            await until(lambda: len(directory.tiers.host) == 1)
            assert dropped == [old.adapter]
            assert shard.drops == [DropAdapterRequest(key, Tier.HOST, old.adapter.info.digest)]
            directory.check(is_idle=True)


async def test_content_that_comes_back_is_the_adapter_it_was() -> None:
    key = hub("adapter-1")
    with FakeShard() as shard:
        async with directory_of(shard) as (directory, dropped):
            first = await directory.acquire(key, "")
            shard.contents["adapter-1"] = "new digest"
            second = await directory.reload(key, "")
            del shard.contents["adapter-1"]
            assert await directory.reload(key, "") is first.adapter
            await until(lambda: dropped == [second])
            first.close()
            (await directory.acquire(key, "")).close()
            assert list(directory.tiers.host) == [first.adapter.content]
            assert dropped == [second]
            assert [fetch.tier for fetch in shard.fetches].count(Tier.HOST) == 1


async def test_a_reload_during_a_load_gives_the_waiting_request_what_is_new() -> None:
    key = hub("adapter-1")
    with FakeShard() as shard:
        async with directory_of(shard) as (directory, _):
            await directory.validate(key, "")
            shard.fetching.close()
            coming = asyncio.create_task(directory.acquire(key, ""))
            await fetched(shard, "adapter-1", times=2)
            shard.contents["adapter-1"] = "new digest"
            reloading = asyncio.create_task(directory.reload(key, ""))
            await fetched(shard, "adapter-1", times=3)
            shard.fetching.open()
            pin = await coming
            assert (await reloading).content == pin.adapter.content
            assert pin.adapter.info.digest == "new digest"
            assert list(directory.tiers.host) == [pin.adapter.content]
            pin.close()


async def test_a_reload_that_fails_leaves_what_there_was() -> None:
    key = hub("private-1")
    with FakeShard() as shard:
        async with directory_of(shard) as (directory, dropped):
            (await directory.acquire(key, SECRET)).close()
            for _ in range(2):  # not remembered: an operator asks
                with pytest.raises(AdapterForbidden) as caught:
                    await directory.reload(key, "wrong")
                assert "Remembered" not in str(caught.value)
            pin = await directory.acquire(key, SECRET)
            assert pin.adapter.in_host
            assert dropped == []
            pin.close()


async def test_a_drop_waits_for_requests_on_older_content_too() -> None:
    key = hub("adapter-1")
    with FakeShard() as shard:
        async with directory_of(shard) as (directory, _):
            old = await directory.acquire(key, "")
            shard.contents["adapter-1"] = "new digest"
            await directory.reload(key, "")
            dropping = asyncio.create_task(directory.drop(key))
            await asyncio.sleep(0.05)
            assert not dropping.done()
            old.close()
            await dropping
            assert not shard.adapters
            assert not shard.superseded
            assert len(directory.tiers.host) == len(directory.tiers.disk) == 0


async def test_what_is_rolled_back_while_it_is_in_use_stays_in_memory() -> None:
    key = local("adapter-1")
    with FakeShard() as shard:
        async with directory_of(shard) as (directory, _):
            old = await directory.acquire(key, "")
            shard.contents["adapter-1"] = "v2"
            await directory.reload(key, "")  # and nobody loads it
            del shard.contents["adapter-1"]
            new = await directory.acquire(key, "")
            assert new.adapter is old.adapter
            assert old.adapter.content in directory.tiers.host
            assert shard.held() == {old.adapter.content}
            for pin in (old, new):
                pin.close()


async def test_where_one_rank_cannot_reload_all_serve_what_they_did() -> None:
    key, config = hub("adapter-1"), FakeConfig(num_shard=2)
    with FakeShard(config) as first, Turning(replace(config, rank=1)) as second:
        async with directory_of(first, second) as (directory, _):
            pin = await directory.acquire(key, "token")
            first.contents["adapter-1"] = second.contents["adapter-1"] = "v2"
            second.is_down = True
            with pytest.raises(SourceUnavailable):
                await directory.reload(key, "")
            for token in ("token", "another token"):
                again = await directory.acquire(key, token)
                assert again.adapter is pin.adapter
                again.close()
            pin.close()
        first.superseded.clear()  # as a new stream has it
        async with directory_of(first, second) as (directory, _):
            assert first.held() == second.held() == set(directory.tiers.host) == set()
            second.is_down = False
            pin = await directory.acquire(key, "")
            assert pin.adapter.info.digest == "v2"
            pin.close()


async def test_who_could_read_the_old_content_must_ask_for_the_new() -> None:
    key = hub("adapter-1")
    with Turning() as shard:
        async with directory_of(shard) as (directory, _):
            (await directory.acquire(key, "")).close()
            shard.is_private = True
            shard.contents["adapter-1"] = "v2"
            await directory.reload(key, SECRET)
            (await directory.acquire(key, SECRET)).close()
            for token in ("", "another token"):
                with pytest.raises(AdapterForbidden):
                    await directory.acquire(key, token)


@pytest.mark.parametrize("token", ["", "another token"])
async def test_an_answer_from_before_a_reload_opens_and_brings_back_nothing(token: str) -> None:
    key = hub("adapter-1")
    with Turning() as shard:
        async with directory_of(shard) as (directory, _):
            old = await directory.acquire(key, SECRET)
            fetch, gate, answers = directory._shards.fetch, asyncio.Event(), list[AdapterInfo]()

            async def late(*args: Any, **options: Any) -> AdapterInfo:
                info = await fetch(*args, **options)
                if args[2] == token and not answers:
                    answers.append(info)
                    await gate.wait()
                return info

            directory._shards.fetch = late  # type: ignore[method-assign]
            checking = asyncio.create_task(directory.acquire(key, token))
            await until(lambda: answers)
            shard.is_private = True
            shard.contents["adapter-1"] = "v2"
            present = await directory.reload(key, SECRET)
            gate.set()
            with pytest.raises(AdapterForbidden):
                await checking
            pin = await directory.acquire(key, SECRET)
            assert pin.adapter is present
            for held in (pin, old):
                held.close()


async def test_a_reload_that_is_refused_leaves_what_waits_for_room() -> None:
    key = hub("adapter-1")
    with Turning(FakeConfig(host_bytes=3 * BYTES)) as shard:
        async with directory_of(shard) as (directory, _):
            other = await directory.acquire(hub("adapter-2"), "")  # takes all the room
            coming = asyncio.create_task(directory.acquire(key, ""))
            await until(lambda: directory.tiers._loading[key])
            shard.is_bad = True
            with pytest.raises(AdapterUnservable):
                await directory.reload(key, "")
            other.close()
            pin = await coming
            assert directory.find(key) is pin.adapter
            assert pin.adapter.content in shard.held()
            pin.close()


async def test_a_second_reload_looks_again() -> None:
    key = hub("adapter-1")
    with FakeShard() as shard:
        async with directory_of(shard) as (directory, _):
            (await directory.acquire(key, "")).close()
            shard.fetching.close()
            first = asyncio.create_task(directory.reload(key, ""))
            await fetched(shard, "adapter-1", times=3)
            second = asyncio.create_task(directory.reload(key, ""))
            await asyncio.sleep(0)
            shard.fetching.open()
            await asyncio.gather(first, second)
            assert sum(fetch.refresh for fetch in shard.fetches) == 2


async def test_a_merge_that_shards_hold_from_before_is_looked_at_again() -> None:
    members = hub("adapter-1"), hub("adapter-2")
    with FakeShard() as shard:
        async with directory_of(shard) as (directory, _):
            (await directory.acquire(merge_of(*members), "")).close()
        async with directory_of(shard) as (directory, _):
            shard.contents["adapter-2"] = "v2"
            await directory.reload(members[1], "")
            pin = await directory.acquire(merge_of(*members), "")
            assert pin.adapter.info.digest == "digest of adapter-1 + v2"
            pin.close()


@pytest.mark.parametrize("pin", ["host", "device"])
async def test_a_pinned_adapter_needs_no_room_beside_itself(pin: str) -> None:
    nbytes = 3 * BYTES  # adapter-1 takes two thirds of it
    async with serving(FakeConfig(host_bytes=nbytes, arena_bytes=nbytes)) as service:
        await service.json("/v1/adapters", {"adapter_id": "adapter-1", "pin": pin})
        hold = await service.engine.hold(local("adapter-1"))
        service.shard.contents["adapter-1"] = "v2"
        reload = {"adapter_id": "adapter-1", "reload": True}
        reloading = asyncio.create_task(service.json("/v1/adapters", reload))
        await service.shard.saw(lambda: any(fetch.refresh for fetch in service.shard.fetches))
        hold.close()
        reloaded = await reloading
        assert (reloaded["digest"], reloaded["pinned"]) == ("v2", pin)
        assert reloaded["tier"] == pin


async def test_a_request_whose_tokenizer_was_not_read_before_a_reload_gets_the_new(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving() as service:
        shard = service.shard
        shard.tokenizers["adapter-1"] = AdapterTokenizer("v1", b"", b"{}")
        await service.json("/v1/adapters", {"adapter_id": "adapter-1"})
        # The files change once more, and are reloaded while the request asks for its tokenizer.
        shard.tokenizers["adapter-1"] = AdapterTokenizer("v2", b"", b"{}")
        shard.contents["adapter-1"] = "v2"
        acquire = service.engine._directory.acquire

        async def slow(*args: Any) -> Any:
            pin = await acquire(*args)
            if pin.adapter.info.digest != "v2":
                await service.engine.control.reload(pin.adapter.key, "")
            return pin

        monkeypatch.setattr(service.engine._directory, "acquire", slow)
        await service.generate("abc", adapter_id="adapter-1", max_new_tokens=1)


async def test_who_waits_on_older_content_counts_for_the_limit() -> None:
    async with serving(FakeConfig(max_rows=1), max_waiting_per_adapter=1) as service:
        body = {"inputs": "abc", "parameters": {"adapter_id": "adapter-1", "max_new_tokens": 2}}
        await service.json("/generate", body)  # so that it is on the device
        service.shard.steps.close()
        running = asyncio.create_task(service.json("/generate", body))
        await until(lambda: service.engine.stats().running == 1)
        waiting = asyncio.create_task(service.json("/generate", body))
        await until(lambda: service.engine.stats().waiting == 1)
        service.shard.contents["adapter-1"] = "v2"
        await service.json("/v1/adapters", {"adapter_id": "adapter-1", "reload": True})
        await service.json("/generate", body, status=429)
        service.shard.steps.open()
        await asyncio.gather(running, waiting)
