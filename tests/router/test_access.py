"""Whose adapter: a source's word holds for a while, for one token, and not a moment longer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafleet.cache.merging.recipe import Member, MergeRecipe
from lorafleet.cache.store import AdapterStore
from lorafleet.proto.messages import AdapterKey
from lorafleet.router.access import AccessMemory
from lorafleet.router.adapters import AdapterDirectory
from lorafleet.router.errors import AdapterForbidden, AdapterNotFound, SourceUnavailable
from lorafleet.router.failure_memory import FailureMemory
from lorafleet.router.shards import ShardGroup
from lorafleet.shard.service import ShardService
from tests.cache.adapter_cases import Settings, tiny_layout, write_adapter
from tests.cache.hub_stand_in import Hub, Repo
from tests.fakes import SECRET, FakeConfig
from tests.router.http_service import serving

KEY, OTHER = AdapterKey("hub", "owner/private"), AdapterKey("hub", "owner/other")
MERGE = MergeRecipe((Member(KEY, 0.5), Member(OTHER, 0.5))).key
TTL = 60.0


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub().serve() as hub:
        folder = write_adapter(tmp_path / "hub")
        hub.repos[KEY.id], hub.repos[OTHER.id] = Repo(folder, "hf_right"), Repo(folder)
        yield hub


@asynccontextmanager
async def directory_on(
    hub: Hub, folder: Path, access: AccessMemory, clock: Clock
) -> AsyncIterator[AdapterDirectory]:
    """A directory on a shard's real store, whose hub is the stand-in."""
    settings = Settings("", str(folder / "cache"))
    cpu = torch.device("cpu")
    store = AdapterStore(settings, tiny_layout(), torch.float32, cpu, hub.endpoint)
    service, address = ShardService(), f"unix:{folder}/shard.sock"
    server = service.listen(address)
    service.open(FakeConfig().info(), store)
    group = await ShardGroup.connect([address], 20.0)
    failures = FailureMemory(clock=clock)
    directory = AdapterDirectory(
        group, group.info.arena_bytes, lambda _: None, failures=failures, access=access
    )
    await directory.start()
    try:
        yield directory
        directory.check(is_idle=True)
    finally:
        await directory.close()
        await group.close()
        server.stop(None).wait()


async def use(directory: AdapterDirectory, token: str, key: AdapterKey = KEY) -> None:
    (await directory.acquire(key, token)).close()


async def test_within_its_time_a_word_is_taken_and_afterwards_asked_for(
    hub: Hub, tmp_path: Path, clock: Clock
) -> None:
    access = AccessMemory(TTL, clock)
    async with directory_on(hub, tmp_path, access, clock) as directory:
        await use(directory, "hf_right")
        asked = len(hub.requests)
        clock.now += TTL - 1
        await use(directory, "hf_right")
        assert len(hub.requests) == asked
        for token in ("hf_wrong", ""):
            with pytest.raises(AdapterNotFound, match="or not for this token"):
                await use(directory, token)
        refused = len(hub.requests)
        assert refused > asked
        with pytest.raises(AdapterNotFound, match="Remembered"):
            await use(directory, "hf_wrong")
        assert len(hub.requests) == refused
        clock.now += 1
        await use(directory, "hf_right")
        assert len(hub.requests) == refused + 1
        await use(directory, "hf_right")
        assert len(hub.requests) == refused + 1


@pytest.mark.parametrize("key", [KEY, MERGE], ids=["private", "merge"])
async def test_a_token_that_was_taken_back_works_until_its_time_is_over(
    hub: Hub, tmp_path: Path, clock: Clock, key: AdapterKey
) -> None:
    async with directory_on(hub, tmp_path, AccessMemory(TTL, clock), clock) as directory:
        await use(directory, "hf_right", key)
        hub.repos[KEY.id].token = "hf_new"
        clock.now += TTL - 1
        await use(directory, "hf_right", key)
        clock.now += 1
        for _ in range(2):
            with pytest.raises(AdapterNotFound, match=KEY.id):
                await use(directory, "hf_right", key)
        await use(directory, "hf_new", key)


async def test_zero_seconds_ask_each_time(hub: Hub, tmp_path: Path, clock: Clock) -> None:
    async with directory_on(hub, tmp_path, AccessMemory(0.0, clock), clock) as directory:
        await use(directory, "hf_right")
        for _ in range(3):
            asked = len(hub.requests)
            await use(directory, "hf_right")
            assert len(hub.requests) == asked + 1
        hub.repos[KEY.id].token = "hf_new"
        with pytest.raises(AdapterNotFound):
            await use(directory, "hf_right")


@pytest.mark.parametrize(("flags", "num_asked"), [({}, 0), ({"adapter_access_ttl": 0.0}, 3)])
async def test_the_flag_says_how_long(flags: dict[str, Any], num_asked: int) -> None:
    chosen = {"adapter_id": "private-1", "adapter_source": "hub", "api_token": SECRET}
    async with serving(**flags) as service:
        await service.generate("abc", max_new_tokens=1, **chosen)
        service.shard.fetches.clear()
        for _ in range(3):
            await service.generate("abc", max_new_tokens=1, **chosen)
        assert len(service.shard.fetches) == num_asked


async def test_a_drop_ends_every_word(hub: Hub, tmp_path: Path, clock: Clock) -> None:
    access = AccessMemory(TTL, clock)
    async with directory_on(hub, tmp_path, access, clock) as directory:
        await use(directory, "hf_right")
        assert len(access) == 1
        await directory.drop(KEY)
        assert len(access) == 0


def test_a_word_counts_from_the_question(clock: Clock) -> None:
    access = AccessMemory(TTL, clock)
    with access.watch(KEY, "a"):
        clock.now += TTL - 1
    assert access.allows(KEY, "a")
    clock.now += 1
    assert not access.allows(KEY, "a")


def test_a_word_is_for_one_token_and_adapter(clock: Clock) -> None:
    access = AccessMemory(TTL, clock)
    with access.watch(KEY, "a"):
        pass
    assert access.allows(KEY, "a")
    assert not access.allows(KEY, "b")
    assert not access.allows(KEY, "")
    assert not access.allows(OTHER, "a")
    assert not access.allows(AdapterKey(KEY.source, KEY.id, "v2"), "a")


@pytest.mark.parametrize(
    ("kind", "is_over"),
    [(AdapterForbidden, True), (AdapterNotFound, True), (SourceUnavailable, False)],
)
def test_a_refusal_ends_an_earlier_word(clock: Clock, kind: type[Exception], is_over: bool) -> None:
    access = AccessMemory(TTL, clock)
    with access.watch(KEY, "a"):
        pass
    with pytest.raises(kind), access.watch(KEY, "a"):
        raise kind("no")
    assert access.allows(KEY, "a") is not is_over


def test_memory_is_bounded_and_holds_no_token(clock: Clock) -> None:
    access = AccessMemory(TTL, clock)
    for number in range(10_050):
        with access.watch(KEY, f"hf_secret_{number}"):
            pass
    assert len(access) == 10_000
    assert access.allows(KEY, "hf_secret_10049")
    assert not access.allows(KEY, "hf_secret_0")
    held = repr([getattr(access, name) for name in vars(access)])
    assert "hf_secret" not in held
