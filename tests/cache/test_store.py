"""The store as the shard's RPCs use it: tiers, budgets, and several callers at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

import pytest
import torch

from lorafleet.cache import store as store_module
from lorafleet.cache.errors import AdapterFault, AdapterNotFound, AdapterUnservable, TierFull
from lorafleet.cache.merging.recipe import Member, MergeRecipe
from lorafleet.cache.packing import PackedAdapter
from lorafleet.cache.sources.local import LocalSource
from lorafleet.cache.store import AdapterStore
from lorafleet.proto.flags import Bytes
from lorafleet.proto.messages import (
    AdapterInfo,
    AdapterKey,
    DropAdapterRequest,
    FetchAdapterRequest,
    FetchProgress,
    Tier,
)
from tests.cache.adapter_cases import (
    HIDDEN,
    Settings,
    config_of,
    pickle_weights,
    split_weights,
    tensors_of,
    tiny_layout,
    write_adapter,
)
from tests.cache.hub_stand_in import Hub, Repo

ONE, TWO = AdapterKey("local", "one"), AdapterKey("local", "two")
HUB = AdapterKey("hub", "owner/adapter")


@pytest.fixture
def config(tmp_path: Path) -> Settings:
    write_adapter(tmp_path / "root" / "one")
    write_adapter(
        tmp_path / "root" / "two",
        config_of(8, target_modules="all-linear"),
        tensors_of(("self_attn.v_proj", "mlp.down_proj"), 8),
    )
    return Settings(str(tmp_path / "root"), str(tmp_path / "cache"))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub().serve() as hub:
        hub.repos["owner/adapter"] = Repo(write_adapter(tmp_path / "hub"))
        yield hub


@pytest.fixture
def store(config: Settings, hub: Hub) -> AdapterStore:
    return open_store(config, hub)


def open_store(config: Settings, hub: Hub | None = None) -> AdapterStore:
    endpoint = hub.endpoint if hub else None
    return AdapterStore(config, tiny_layout(), torch.bfloat16, torch.device("cpu"), endpoint)


def fetch(
    store: AdapterStore, key: AdapterKey, tier: Tier = Tier.HOST, token: str = ""
) -> AdapterInfo:
    return store.fetch(FetchAdapterRequest(key, tier, token), lambda progress: None)


def drop(store: AdapterStore, key: AdapterKey, tier: Tier, digest: str = "") -> None:
    store.drop(DropAdapterRequest(key, tier, digest))


def refresh(store: AdapterStore, key: AdapterKey, tier: Tier = Tier.HOST) -> AdapterInfo:
    return store.fetch(FetchAdapterRequest(key, tier, refresh=True), lambda progress: None)


def host(store: AdapterStore, key: AdapterKey) -> PackedAdapter:
    """The packed adapter as it is now."""
    return store.host(fetch(store, key, Tier.DISK).content)


def test_disk_sizes_and_host_packs(store: AdapterStore) -> None:
    sized = fetch(store, TWO, Tier.DISK)
    assert sized.tier is Tier.DISK
    assert sized.rank == 8
    assert sized.target_modules == ["down_proj", "v_proj"]
    assert sized.disk_bytes == 0
    assert len(sized.digest) == 64
    with pytest.raises(AdapterNotFound, match="not in host memory"):
        host(store, TWO)
    assert fetch(store, TWO) == replace(sized, tier=Tier.HOST)
    packed = host(store, TWO)
    assert packed.nbytes == sized.packed_bytes
    assert packed.buffer.dtype is torch.bfloat16
    assert packed.buffer.numel() * 2 == packed.nbytes


def test_stages_are_reported_in_order(store: AdapterStore) -> None:
    seen: list[FetchProgress] = []
    store.fetch(FetchAdapterRequest(HUB, Tier.HOST), seen.append)
    assert list(dict.fromkeys(p.stage for p in seen)) == ["downloading", "reading", "packing"]
    assert all(0 < p.done_bytes <= p.total_bytes for p in seen)
    assert all(p.info is None for p in seen)


def test_hub_adapters_take_disk(store: AdapterStore, tmp_path: Path) -> None:
    info = fetch(store, HUB)
    files = [path for path in (tmp_path / "hub").iterdir() if path.name.startswith("adapter_")]
    assert info.disk_bytes == sum(path.stat().st_size for path in files)


def test_a_slot_of_the_same_content_has_the_same_digest(store: AdapterStore) -> None:
    assert fetch(store, HUB).digest == fetch(store, ONE).digest != fetch(store, TWO).digest


def test_host_budget_is_kept_to_the_byte(config: Settings) -> None:
    sizes = {key: fetch(open_store(config), key, Tier.DISK).packed_bytes for key in (ONE, TWO)}
    budget = Bytes(sizes[ONE] + sizes[TWO] - 1)
    store = open_store(replace(config, adapter_host_bytes=budget))
    fetch(store, ONE)
    with pytest.raises(TierFull, match=f"needs {sizes[TWO]} bytes"):
        fetch(store, TWO)
    assert host(store, ONE).nbytes == sizes[ONE]
    assert fetch(store, TWO, Tier.DISK).tier is Tier.DISK
    drop(store, ONE, Tier.HOST)
    assert fetch(store, TWO).tier is Tier.HOST


def test_a_refused_adapter_gives_its_room_back(config: Settings, tmp_path: Path) -> None:
    size = fetch(open_store(config), ONE, Tier.DISK).packed_bytes
    store = open_store(replace(config, adapter_host_bytes=Bytes(size)))
    tensors = tensors_of()
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][0, 0] = float("nan")
    write_adapter(tmp_path / "root" / "broken", tensors=tensors)
    for _ in range(3):
        with pytest.raises(AdapterUnservable, match="not finite"):
            fetch(store, AdapterKey("local", "broken"))
    assert fetch(store, ONE).tier is Tier.HOST


def test_pickled_weights_are_served_where_the_operator_allows_them(
    config: Settings, tmp_path: Path
) -> None:
    pickle_weights(write_adapter(tmp_path / "root" / "pickled"))
    key = AdapterKey("local", "pickled")
    with pytest.raises(AdapterUnservable, match="--allow-pickled-adapters"):
        fetch(open_store(config), key)
    store = open_store(replace(config, allow_pickled_adapters=True))
    fetch(store, key)
    fetch(store, ONE)
    assert torch.equal(host(store, key).buffer, host(store, ONE).buffer)


def test_drop_forgets_the_tier_and_above(store: AdapterStore, tmp_path: Path) -> None:
    fetch(store, HUB)
    drop(store, HUB, Tier.HOST)
    with pytest.raises(AdapterNotFound):
        host(store, HUB)
    assert fetch(store, HUB, Tier.DISK).tier is Tier.DISK
    fetch(store, HUB)
    drop(store, HUB, Tier.DISK)
    assert [key for key in store.list() if key.key == HUB] == []
    assert list((tmp_path / "cache" / "hub").iterdir()) == []
    for key in (HUB, ONE, AdapterKey("pigeon", "nowhere"), AdapterKey("hub", "..")):
        drop(store, key, Tier.DISK)


def test_a_dropped_adapters_memory_lives_while_it_is_used(store: AdapterStore) -> None:
    fetch(store, ONE)
    packed = host(store, ONE)
    content = packed.buffer.clone()
    drop(store, ONE, Tier.HOST)
    fetch(store, TWO)
    assert torch.equal(packed.buffer, content)


def test_what_is_held_stays_what_it_was_until_dropped(store: AdapterStore, tmp_path: Path) -> None:
    before = fetch(store, ONE)
    write_adapter(tmp_path / "root" / "one", tensors=tensors_of(seed=1))
    assert fetch(store, ONE) == before
    drop(store, ONE, Tier.DISK)
    assert fetch(store, ONE).digest != before.digest


@pytest.mark.parametrize("key", [ONE, HUB])
def test_a_refresh_leaves_the_older_content_to_those_who_use_it(
    store: AdapterStore, hub: Hub, tmp_path: Path, key: AdapterKey
) -> None:
    before = fetch(store, key)
    content = host(store, key).buffer.clone()
    assert refresh(store, key) == before
    change(hub, tmp_path, seed=1)
    assert fetch(store, key) == before
    sized = refresh(store, key, Tier.DISK)
    assert (sized.tier, sized.digest != before.digest) == (Tier.DISK, True)
    assert torch.equal(store.host(before.content).buffer, content)
    assert fetch(store, key) == replace(sized, tier=Tier.HOST)
    assert not torch.equal(host(store, key).buffer, content)
    assert [info for info in store.list() if info.key == key] == [fetch(store, key)]
    drop(store, key, Tier.HOST, before.digest)
    with pytest.raises(AdapterNotFound):
        store.host(before.content)
    assert host(store, key)


def test_a_refresh_back_to_what_is_still_held_packs_nothing(
    store: AdapterStore, hub: Hub, tmp_path: Path
) -> None:
    before = fetch(store, ONE)
    packed = host(store, ONE)
    change(hub, tmp_path, seed=1)
    refresh(store, ONE)
    change(hub, tmp_path, seed=0)
    assert refresh(store, ONE) == before
    assert host(store, ONE) is packed


def test_a_refresh_that_fails_changes_nothing(
    store: AdapterStore, hub: Hub, tmp_path: Path
) -> None:
    before = {key: fetch(store, key) for key in (ONE, HUB)}
    (tmp_path / "root" / "one" / "adapter_config.json").write_text("{")
    del hub.repos["owner/adapter"]
    for key, info in before.items():
        with pytest.raises(AdapterFault):
            refresh(store, key)
        assert fetch(store, key) == info
        drop(store, key, Tier.HOST)
    assert fetch(store, HUB) == before[HUB]  # its download is still there


def test_a_fetch_of_a_digest_is_answered_by_what_is_held_of_it(
    store: AdapterStore, hub: Hub, tmp_path: Path
) -> None:
    old = fetch(store, ONE)
    change(hub, tmp_path, seed=1)
    new = refresh(store, ONE, Tier.DISK)

    def ask(digest: str) -> AdapterInfo:
        request = FetchAdapterRequest(ONE, Tier.HOST, digest=digest)
        return store.fetch(request, lambda progress: None)

    assert ask(old.digest) == old
    assert ask("another digest") == new  # which is not packed
    assert ask(new.digest) == replace(new, tier=Tier.HOST)


@pytest.mark.parametrize("is_split", [False, True])
def test_another_ranks_refresh_does_not_break_a_load(
    config: Settings, hub: Hub, tmp_path: Path, is_split: bool
) -> None:
    if is_split:
        split_weights(hub.repos["owner/adapter"].directory)
    ranks = [open_store(config, hub) for _ in range(2)]
    fetch(ranks[0], HUB, Tier.DISK)
    reading, go, found = Event(), Event(), list[AdapterInfo]()

    def wait(progress: FetchProgress) -> None:
        if not reading.is_set():
            reading.set()
            assert go.wait(60)

    def load() -> None:
        found.append(ranks[1].fetch(FetchAdapterRequest(HUB, Tier.HOST), wait))

    loading = Thread(target=load)
    loading.start()
    assert reading.wait(60)
    for path in hub.repos["owner/adapter"].directory.iterdir():
        path.unlink()
    change(hub, tmp_path, seed=1)
    new = refresh(ranks[0], HUB, Tier.DISK)
    go.set()
    loading.join()
    assert found == [replace(new, tier=Tier.HOST)]


def test_a_private_adapters_host_copy_is_counted(config: Settings, hub: Hub) -> None:
    hub.repos["owner/adapter"].token = "hf_right"
    store = open_store(config, hub)
    info = fetch(store, HUB, token="hf_right")
    (listed,) = (listed for listed in store.list() if listed.key == HUB)
    assert (listed.content, listed.tier, listed.is_public) == (info.content, Tier.HOST, False)
    assert (listed.packed_bytes, listed.disk_bytes) == (info.packed_bytes, info.disk_bytes)


def test_what_nobody_knows_any_more_is_dropped_at_once(
    store: AdapterStore, hub: Hub, tmp_path: Path
) -> None:
    old, two = fetch(store, ONE), fetch(store, TWO)
    change(hub, tmp_path, seed=1)
    new = refresh(store, ONE)
    store.drop_superseded()
    with pytest.raises(AdapterNotFound):
        store.host(old.content)
    assert store.host(new.content).nbytes + store.host(two.content).nbytes > 0


def change(hub: Hub, tmp_path: Path, seed: int) -> None:
    """Other weights, in the folder and on the hub."""
    for directory in (tmp_path / "root" / "one", hub.repos["owner/adapter"].directory):
        write_adapter(directory, tensors=tensors_of(seed=seed))


def test_an_adapter_that_changed_on_disk_is_read_again(store: AdapterStore, tmp_path: Path) -> None:
    before = fetch(store, ONE, Tier.DISK)
    write_adapter(tmp_path / "root" / "one", config_of(2), tensors_of(rank=2, seed=1))
    after = fetch(store, ONE)
    assert (before.rank, after.rank) == (4, 2)
    assert after.digest != before.digest


def test_a_merge_is_an_adapter_in_every_tier(store: AdapterStore, hub: Hub) -> None:
    key = MergeRecipe((Member(ONE, 0.25), Member(HUB, 0.25))).key
    sized = fetch(store, key, Tier.DISK)
    assert (sized.tier, sized.rank, sized.target_modules) == (Tier.DISK, 4, ["q_proj"])
    assert sized.disk_bytes > 0
    assert fetch(store, key) == replace(sized, tier=Tier.HOST)
    # A and B are summed apart, so two quarters of the same adapter are that adapter.
    fetch(store, ONE)
    merged, whole = host(store, key), host(store, ONE)
    assert merged.form == whole.form
    product, expected = (_product(packed.form.rows[0], packed.buffer) for packed in (merged, whole))
    torch.testing.assert_close(product, expected, rtol=0.02, atol=0.1)
    assert key in [info.key for info in store.list()]
    hub.repos["owner/adapter"].token = "hf_right"  # what is here of it was public
    assert fetch(store, key).tier is Tier.HOST
    drop(store, key, Tier.HOST)
    with pytest.raises(AdapterNotFound):
        host(store, key)
    drop(store, key, Tier.DISK)
    assert key not in [info.key for info in store.list()]


def _product(row: tuple[int, ...], buffer: torch.Tensor) -> torch.Tensor:
    """B A of a site's first target, from where a form's row says they lie."""
    a, _, rank, b = row[:4]
    a_block = buffer[a : a + rank * HIDDEN].view(rank, HIDDEN).float()
    return buffer[b : b + rank * HIDDEN].view(rank, HIDDEN).float().T @ a_block


def test_lists_what_anyone_may_use(config: Settings, hub: Hub, tmp_path: Path) -> None:
    write_adapter(tmp_path / "root" / "unservable", config_of(use_dora=True))
    store = open_store(config, hub)
    known = fetch(store, TWO)
    assert [(info.key, info.tier) for info in store.list()] == [(ONE, Tier.DISK), (TWO, Tier.HOST)]
    assert [info.digest for info in store.list()] == ["", known.digest]
    fetch(store, HUB, Tier.DISK)
    assert HUB in [info.key for info in open_store(config).list()]  # another process finds it


def test_downloads_that_are_not_for_everyone_are_counted_and_not_shown(
    config: Settings, hub: Hub, tmp_path: Path
) -> None:
    hub.repos["owner/adapter"].token = "hf_right"
    held = fetch(open_store(config, hub), HUB, Tier.DISK, "hf_right")
    hub.repos["owner/bad"] = Repo(write_adapter(tmp_path / "bad", config_of(r=3)))
    bad = AdapterKey("hub", "owner/bad")
    with pytest.raises(AdapterUnservable):
        fetch(open_store(config, hub), bad, Tier.DISK)  # and its process is killed
    found = {info.key: info for info in open_store(config).list() if not info.is_public}
    assert found.keys() == {HUB, bad}
    assert found[HUB] == AdapterInfo(HUB, "", 0, 0, held.disk_bytes, [], Tier.DISK, is_public=False)
    assert found[bad].disk_bytes > 0


def test_a_download_that_a_process_died_of_is_not_read_at_the_next_start(
    config: Settings, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "read_spec", die)
        with pytest.raises(Killed):
            fetch(open_store(config, hub), HUB, Tier.DISK)
    with monkeypatch.context() as patch:
        patch.setattr(LocalSource, "list", lambda _: [])
        patch.setattr(store_module, "read_spec", die)
        (found,) = open_store(config).list()
    assert (found.key, found.is_public, found.rank) == (HUB, False, 0)
    assert found.disk_bytes > 0
    assert fetch(open_store(config, hub), HUB, Tier.DISK).disk_bytes == found.disk_bytes
    assert [info.rank for info in open_store(config).list() if info.key == HUB] == [4]


def test_an_unknown_source_is_named(store: AdapterStore) -> None:
    with pytest.raises(AdapterNotFound, match="'pigeon'"):
        fetch(store, AdapterKey("pigeon", "bucket/adapter"))


def test_a_private_adapter_in_host_memory_still_asks_for_its_token(
    store: AdapterStore, hub: Hub
) -> None:
    hub.repos["owner/adapter"].token = "hf_right"
    fetch(store, HUB, token="hf_right")
    with pytest.raises(AdapterNotFound):
        fetch(store, HUB, token="hf_wrong")
    with pytest.raises(AdapterNotFound):
        fetch(store, HUB)
    assert fetch(store, HUB, token="hf_right").tier is Tier.HOST


def test_callers_of_one_adapter_pack_it_once(store: AdapterStore, hub: Hub) -> None:
    stages: list[str] = []

    def fetch_it(_: int) -> AdapterInfo:
        request = FetchAdapterRequest(HUB, Tier.HOST)
        return store.fetch(request, lambda progress: stages.append(progress.stage))

    with ThreadPoolExecutor(8) as pool:
        infos = list(pool.map(fetch_it, range(8)))
    assert len(set(map(repr, infos))) == 1
    assert hub.count("GET /owner/adapter/resolve") == 2
    modules = 2
    assert stages.count("packing") == modules


def test_a_slow_source_blocks_no_other_adapter(store: AdapterStore, hub: Hub) -> None:
    hub.repos["owner/adapter"].gate.clear()
    waiting, answered = Event(), Event()

    def watch(progress: FetchProgress) -> None:
        answered.set()

    def slow() -> AdapterInfo:
        waiting.set()
        return store.fetch(FetchAdapterRequest(HUB, Tier.HOST), watch)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(slow)
        waiting.wait()
        assert fetch(store, ONE).tier is Tier.HOST
        assert [info.key for info in store.list()] == [ONE, TWO]
        drop(store, TWO, Tier.DISK)
        assert not answered.is_set()
        hub.repos["owner/adapter"].gate.set()
        assert future.result().tier is Tier.HOST


@pytest.mark.parametrize(("stage", "tier"), [("reading", Tier.DISK), ("packing", Tier.HOST)])
def test_a_list_waits_for_no_work(store: AdapterStore, stage: str, tier: Tier) -> None:
    reached, go_on = Event(), Event()

    def watch(progress: FetchProgress) -> None:
        if progress.stage == stage:
            reached.set()
            go_on.wait()

    with ThreadPoolExecutor(2) as pool:
        try:
            work = pool.submit(store.fetch, FetchAdapterRequest(ONE, Tier.HOST), watch)
            reached.wait()
            infos = pool.submit(store.list).result(timeout=10)
        finally:
            go_on.set()
        # What is being packed has its room, and a router that starts now must count it.
        assert [(info.key, info.tier) for info in infos] == [(ONE, tier), (TWO, Tier.DISK)]
        assert infos[0].packed_bytes == work.result().packed_bytes
    assert store.list()[0] == work.result(), "the list took the digest away"


def test_different_adapters_at_once_keep_the_budget(config: Settings, tmp_path: Path) -> None:
    for index in range(8):
        write_adapter(tmp_path / "root" / f"a{index}", tensors=tensors_of(seed=index))
    size = fetch(open_store(config), AdapterKey("local", "a0"), Tier.DISK).packed_bytes
    store = open_store(replace(config, adapter_host_bytes=Bytes(5 * size)))

    def fetch_it(index: int) -> bool:
        try:
            fetch(store, AdapterKey("local", f"a{index}"))
        except TierFull:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(fetch_it, range(8))) == 5


def test_every_fault_is_a_cache_error(store: AdapterStore, tmp_path: Path) -> None:
    (tmp_path / "root" / "file").write_text("no directory")
    (tmp_path / "root" / "empty").mkdir()
    for name in ("file", "empty", "../hub", "", "\0"):
        for tier in (Tier.DISK, Tier.HOST):
            with pytest.raises(AdapterFault):
                fetch(store, AdapterKey("local", name), tier)


def test_host_room_is_given_back_while_the_source_is_slow(
    store: AdapterStore, hub: Hub, tmp_path: Path
) -> None:
    held = fetch(store, HUB)
    newer = write_adapter(
        tmp_path / "newer",
        config_of(8, target_modules="all-linear"),
        tensors_of(("self_attn.v_proj",), 8),
    )
    hub.repos["owner/adapter"] = repo = Repo(newer)
    repo.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        coming = pool.submit(refresh, store, HUB, Tier.DISK)
        while hub.count("/resolve/") < 3:
            time.sleep(0.01)
        try:
            pool.submit(drop, store, HUB, Tier.HOST, held.digest).result(timeout=30)
        finally:
            repo.gate.set()
        assert coming.result().digest != held.digest
