"""AdapterDirectory against a fake shard: sharing, budgets, pins, errors and access."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest

from lorafleet.proto.messages import AdapterInfo, AdapterKey, DropAdapterRequest, Tier
from lorafleet.router.adapter import Adapter
from lorafleet.router.adapters import AdapterDirectory
from lorafleet.router.errors import (
    AdapterForbidden,
    AdapterNotFound,
    AdapterUnservable,
    Overloaded,
    RequestError,
    SourceTimeout,
    SourceUnavailable,
)
from lorafleet.router.failure_memory import FailureMemory
from lorafleet.router.shards import ShardGroup
from tests.fakes import SECRET, FakeConfig, FakeShard

BYTES = (
    4096  # adapter-0, -3, -6, ... take this; adapter-1, -4, ... twice; adapter-2, -5, ... thrice
)


def local(name: str) -> AdapterKey:
    return AdapterKey("local", name)


def hub(name: str) -> AdapterKey:
    return AdapterKey("hub", name)


@asynccontextmanager
async def directory_of(
    *shards: FakeShard, failures: FailureMemory | None = None
) -> AsyncIterator[tuple[AdapterDirectory, list[Adapter]]]:
    """A directory on these ranks, and the adapters it drops."""
    group = await ShardGroup.connect([shard.address for shard in shards], 20.0)
    dropped: list[Adapter] = []
    directory = AdapterDirectory(group, group.info.arena_bytes, dropped.append, failures=failures)
    await directory.start()
    try:
        yield directory, dropped
        directory.check(is_idle=False)
    finally:
        await directory.close()
        await group.close()


async def test_concurrent_requests_share_one_fetch_on_every_rank() -> None:
    config = FakeConfig(num_shard=2)
    with FakeShard(config) as first, FakeShard(replace(config, rank=1)) as second:
        async with directory_of(first, second) as (directory, _):
            pins = await asyncio.gather(
                *(directory.acquire(local("adapter-1"), "") for _ in range(5))
            )
            assert len({pin.adapter for pin in pins}) == 1
            assert pins[0].adapter.num_pins == 5
            for shard in (first, second):
                assert [fetch.tier for fetch in shard.fetches] == [Tier.DISK, Tier.HOST]
            for pin in pins:
                pin.close()
                pin.close()
            directory.check(is_idle=True)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("missing", AdapterNotFound, "has no adapter missing"),
        ("nobody", AdapterNotFound, "there is no adapter nobody"),
        ("broken", AdapterUnservable, "use_dora is not supported"),
        ("down", SourceUnavailable, "not reachable"),
        ("slow", SourceTimeout, "within 30 s"),
        ("private-1", AdapterForbidden, "no access"),
    ],
)
async def test_a_failed_fetch_is_the_requests_error_and_changes_nothing(
    name: str, kind: type[RequestError], words: str
) -> None:
    with FakeShard() as shard:
        async with directory_of(shard) as (directory, _):
            for _ in range(2):
                with pytest.raises(kind, match=words):
                    await directory.acquire(local(name), "")
            assert len(shard.fetches) == 2  # a local failure is not remembered
            assert list(directory) == []
            directory.check(is_idle=True)


async def test_what_is_refused_is_dropped_from_every_disk() -> None:
    config = FakeConfig(num_shard=2)
    with FakeShard(config) as first, FakeShard(replace(config, rank=1)) as second:
        async with directory_of(first, second) as (directory, _):
            with pytest.raises(AdapterUnservable):
                await directory.acquire(hub("broken"), "")
            for shard in (first, second):
                assert shard.drops == [DropAdapterRequest(hub("broken"), Tier.DISK)]
            with pytest.raises(SourceUnavailable):
                await directory.acquire(hub("down"), "")
            assert len(first.drops) == 1  # what came of it is gone on with


async def test_what_only_takes_disk_is_evicted_for_others() -> None:
    with FakeShard(FakeConfig(disk_bytes=2 * BYTES)) as shard:
        info = AdapterInfo(hub("secret"), "", 0, 0, 2 * BYTES, [], Tier.DISK, is_public=False)
        shard.adapters[info.key] = info
        async with directory_of(shard) as (directory, _):
            assert directory.tiers.disk.used == 2 * BYTES
            (await directory.acquire(hub("adapter-0"), "")).close()
            assert shard.drops == [DropAdapterRequest(info.key, Tier.DISK)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("missing", AdapterNotFound),
        ("broken", AdapterUnservable),
        ("down", SourceUnavailable),
        ("slow", SourceTimeout),
        ("private-1", AdapterForbidden),
    ],
)
async def test_a_remote_failure_is_remembered_for_that_token_and_revision(
    name: str, kind: type[RequestError]
) -> None:
    now = [100.0]
    with FakeShard() as shard:
        async with directory_of(shard, failures=FailureMemory(clock=lambda: now[0])) as (
            directory,
            _,
        ):

            async def ask(key: AdapterKey, token: str = "") -> str:
                with pytest.raises(kind) as caught:
                    await directory.acquire(key, token)
                return str(caught.value)

            assert "Remembered" not in await ask(hub(name))
            for _ in range(3):
                assert "tried again in 1 s" in await ask(hub(name))
            assert len(shard.fetches) == 1
            await ask(hub(name), "a token")
            await ask(replace(hub(name), revision="v2"))
            assert len(shard.fetches) == 3
            now[0] += 1.0
            assert "Remembered" not in await ask(hub(name))
            assert "tried again in 2 s" in await ask(hub(name))
            assert len(shard.fetches) == 4


async def test_requests_that_share_a_failing_fetch_count_once() -> None:
    now = [100.0]
    with FakeShard() as shard:
        async with directory_of(shard, failures=FailureMemory(clock=lambda: now[0])) as (
            directory,
            _,
        ):
            shard.fetching.close()
            asked = [asyncio.create_task(directory.acquire(hub("down"), "")) for _ in range(8)]
            await fetched(shard, "down")
            shard.fetching.open()
            answers = await asyncio.gather(*asked, return_exceptions=True)
            assert {type(answer) for answer in answers} == {SourceUnavailable}
            assert len(shard.fetches) == 1
            with pytest.raises(SourceUnavailable, match="again in 1 s"):
                await directory.acquire(hub("down"), "")


def _remember(failures: FailureMemory, key: AdapterKey) -> None:
    with suppress(SourceUnavailable), failures.watch(key, ""):
        raise SourceUnavailable("the source was down")


async def test_a_fetch_that_succeeds_ends_the_row_of_failures() -> None:
    now, key = [100.0], hub("adapter-1")
    failures = FailureMemory(clock=lambda: now[0])
    with FakeShard() as shard:
        async with directory_of(shard, failures=failures) as (directory, _):
            _remember(failures, key)
            with pytest.raises(SourceUnavailable, match="Remembered"):
                await directory.acquire(key, "")
            now[0] += 1.0
            (await directory.acquire(key, "")).close()
            assert not len(failures)


async def test_who_drops_an_adapter_has_it_tried_again_at_once() -> None:
    key, failures = hub("adapter-1"), FailureMemory()
    with FakeShard() as shard:
        async with directory_of(shard, failures=failures) as (directory, _):
            _remember(failures, key)
            await directory.drop(key)
            (await directory.acquire(key, "")).close()


async def test_a_failure_is_nobody_elses() -> None:
    with FakeShard() as shard:
        async with directory_of(shard) as (directory, _):
            with pytest.raises(AdapterForbidden):
                await directory.acquire(hub("private-1"), "wrong")
            (await directory.acquire(hub("private-1"), SECRET)).close()
            with pytest.raises(AdapterForbidden, match="Remembered"):
                await directory.acquire(hub("private-1"), "wrong")


async def test_the_least_recently_used_adapter_makes_room() -> None:
    with FakeShard(FakeConfig(host_bytes=3 * BYTES)) as shard:
        async with directory_of(shard) as (directory, dropped):
            for name in ("adapter-0", "adapter-3", "adapter-6", "adapter-0", "adapter-9"):
                (await directory.acquire(local(name), "")).close()
            assert [adapter.key.id for adapter in dropped] == ["adapter-3"]
            assert [(drop.key.id, drop.tier) for drop in shard.drops] == [("adapter-3", Tier.HOST)]
            assert directory.tiers.host.num_evictions == 1
            assert directory.tiers.host.used == 3 * BYTES


async def test_while_everything_is_pinned_requests_wait_in_order() -> None:
    with FakeShard(FakeConfig(host_bytes=3 * BYTES)) as shard:
        async with directory_of(shard) as (directory, _):
            held = [await directory.acquire(local(f"adapter-{n}"), "") for n in (0, 3, 6)]
            big = asyncio.create_task(directory.acquire(local("adapter-2"), ""))
            await fetched(shard, "adapter-2")
            small = asyncio.create_task(directory.acquire(local("adapter-9"), ""))
            await fetched(shard, "adapter-9")
            for pin in held:
                assert not big.done()
                assert not small.done()
                pin.close()
            # The shard itself refuses what is over its budget.
            (await big).close()
            (await small).close()
            packed = [fetch.key.id for fetch in shard.fetches if fetch.tier is Tier.HOST]
            assert packed[3:] == ["adapter-2", "adapter-9"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (FakeConfig(host_bytes=BYTES), "takes 8192 bytes .* 4096 bytes --adapter-host-bytes"),
        (FakeConfig(arena_bytes=BYTES), "takes 8192 bytes .* 4096 bytes --adapter-device-bytes"),
    ],
)
async def test_an_adapter_larger_than_a_budget_is_refused_naming_both_sizes(
    config: FakeConfig, words: str
) -> None:
    with FakeShard(config) as shard:
        async with directory_of(shard) as (directory, dropped):
            with pytest.raises(AdapterUnservable, match=words):
                await directory.acquire(local("adapter-1"), "")
            (await directory.acquire(local("adapter-0"), "")).close()
            assert dropped == []


async def test_a_download_that_never_fits_on_disk_is_refused() -> None:
    with FakeShard(FakeConfig(disk_bytes=BYTES)) as shard:
        async with directory_of(shard) as (directory, _):
            (await directory.acquire(hub("adapter-0"), "")).close()
            with pytest.raises(Overloaded, match="disk tier is full"):
                await directory.acquire(hub("adapter-1"), "")
            assert directory.tiers.disk.used == 0  # it tried with all the room there is


async def test_downloads_are_deleted_when_the_disk_is_full_but_not_while_in_use() -> None:
    with FakeShard(FakeConfig(disk_bytes=3 * BYTES)) as shard:
        async with directory_of(shard) as (directory, dropped):
            kept = await directory.acquire(hub("adapter-0"), "")
            for name in ("adapter-3", "adapter-6", "adapter-9"):
                (await directory.acquire(hub(name), "")).close()
            assert [adapter.key.id for adapter in dropped] == ["adapter-3"]
            assert [(drop.key.id, drop.tier) for drop in shard.drops] == [("adapter-3", Tier.DISK)]
            kept.close()
            assert (await directory.acquire(hub("adapter-0"), "")).adapter is kept.adapter


async def test_what_the_shards_already_hold_is_counted() -> None:
    with FakeShard(FakeConfig(host_bytes=3 * BYTES)) as shard:
        async with directory_of(shard) as (before, _):
            (await before.acquire(hub("adapter-1"), "")).close()
        async with directory_of(shard) as (directory, _):
            assert directory.tiers.host.used == 2 * BYTES
            assert directory.tiers.disk.used == 2 * BYTES
            (await directory.acquire(hub("adapter-4"), "")).close()
            assert [drop.key.id for drop in shard.drops] == ["adapter-1"]


async def test_access_is_checked_with_each_callers_own_token() -> None:
    with FakeShard() as shard:
        async with directory_of(shard) as (directory, _):
            (await directory.acquire(hub("private-1"), SECRET)).close()
            for token in ("", "wrong"):
                with pytest.raises(AdapterForbidden):
                    await directory.acquire(hub("private-1"), token)
            (await directory.acquire(hub("private-1"), SECRET)).close()
            assert [fetch.tier for fetch in shard.fetches].count(Tier.HOST) == 1


async def test_a_public_adapter_is_checked_once() -> None:
    with FakeShard() as shard:
        async with directory_of(shard) as (directory, _):
            for _ in range(3):
                (await directory.acquire(hub("adapter-1"), "")).close()
            assert len(shard.fetches) == 2


async def test_a_cancelled_request_leaves_no_pin() -> None:
    with FakeShard() as shard:
        async with directory_of(shard) as (directory, _):
            shard.fetching.close()
            task = asyncio.create_task(directory.acquire(local("adapter-1"), ""))
            await fetched(shard, "adapter-1")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            shard.fetching.open()
            (await directory.acquire(local("adapter-1"), "")).close()
            directory.check(is_idle=True)


async def fetched(shard: FakeShard, name: str, times: int = 1) -> None:
    """Returns once the shard has been asked for an adapter so many times."""
    await shard.saw(lambda: sum(fetch.key.id == name for fetch in shard.fetches) >= times)


async def test_a_check_whose_caller_left_keeps_what_it_looks_at() -> None:
    """Whoever needs disk room would else wait for it to be dropped, and so for its source."""
    with FakeShard() as shard:
        async with directory_of(shard) as (directory, _):
            (await directory.acquire(hub("adapter-1"), "")).close()
            shard.fetching.close()
            caller = asyncio.create_task(directory.reload(hub("adapter-1"), ""))
            await shard.saw(lambda: len(shard.fetches) == 3)
            caller.cancel()
            await asyncio.gather(caller, return_exceptions=True)
            assert directory._is_disk_pinned(hub("adapter-1"))
            shard.fetching.open()
            await directory.tiers.until(lambda: not directory._is_disk_pinned(hub("adapter-1")))
