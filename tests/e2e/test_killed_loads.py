"""Shard or router killed during a load: the next start repairs, and serves no half file."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import aiohttp
import grpc
import psutil
import pytest

from lorafleet.proto import shard_pb2
from lorafleet.proto.codec import decode, encode
from lorafleet.proto.messages import AdapterKey, FetchAdapterRequest, FetchProgress, Tier
from tests.cache.archive_cases import FILES, tar_of
from tests.cache.hub_stand_in import Hub, Repo
from tests.cache.proxy import Proxy
from tests.cache.web_server import WebServer
from tests.checkpoints import ALL_LINEAR, RECIPES, Recipe, make_adapters, make_checkpoint
from tests.e2e.budgets import shard_addresses
from tests.e2e.oracle import Oracle
from tests.e2e.questions import ids_of
from tests.e2e.s3_server import BUCKET, s3_server
from tests.e2e.service import Service, serve, start
from tests.e2e.test_failures import children

NAME, PROMPT, NEW_TOKENS = "r16-all", "the quick brown fox", 10
HALF = 20_000  # bytes of the weights that come before the source falls silent
WAIT_SECONDS = 60


@dataclass(frozen=True)
class Made:
    """A model, an adapter, and what peft answers with it."""

    model: Path
    folder: Path
    answer: list[int]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    recipe = next(recipe for recipe in RECIPES if recipe.name == NAME)
    return make_made(tmp_path_factory.mktemp("killed"), recipe)


def make_made(root: Path, recipe: Recipe, **changes: Any) -> Made:
    """`changes` are of the model's config."""
    model = make_checkpoint("llama", root / "model", **changes)
    make_adapters(model, root / "adapters", (recipe,))
    oracle = Oracle(model, root / "adapters", [recipe.name])
    answer = oracle.answer(ids_of(PROMPT), recipe.name, NEW_TOKENS)
    return Made(model, root / "adapters" / recipe.name, answer)


@dataclass
class Slow:
    """A source that sends half of the weights, until it is `released`."""

    source: str
    id: str
    flags: tuple[str, ...]
    release: Callable[[], None]


@pytest.fixture
def slow(
    request: pytest.FixtureRequest, made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Slow]:
    if request.param == "hub":
        source = slow_hub(made, monkeypatch)
    elif request.param == "http":
        source = slow_archive(made, tmp_path / "web")
    else:
        source = slow_s3(made, monkeypatch)
    with source as found:
        yield found


@contextmanager
def slow_hub(made: Made, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    with Hub().serve() as hub:
        repo = hub.repos[f"owner/{NAME}"] = Repo(made.folder, first_bytes=HALF)
        repo.gate.clear()
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield Slow("hub", f"owner/{NAME}", (), repo.gate.set)


@contextmanager
def slow_archive(made: Made, root: Path) -> Iterator[Slow]:
    root.mkdir()
    files = {name: (made.folder / name).read_bytes() for name in FILES}
    (root / "a.tar.gz").write_bytes(tar_of(files))
    with WebServer(root) as web, stalling(web.url) as proxy:
        flags = (f"--adapter-http-hosts={proxy.host}",)
        yield Slow("http", f"{proxy.url}/files/a.tar.gz", flags, partial(resume, proxy))


@contextmanager
def slow_s3(made: Made, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    with s3_server(monkeypatch) as s3:
        for name in FILES:
            s3.put(f"team/{NAME}/{name}", (made.folder / name).read_bytes())
        with stalling(s3.url) as proxy:
            flags = (f"--adapter-s3-endpoint={proxy.url}",)
            yield Slow("s3", f"s3://{BUCKET}/team/{NAME}", flags, partial(resume, proxy))


@contextmanager
def stalling(url: str) -> Iterator[Proxy]:
    with Proxy(url) as proxy:
        proxy.stall_after = HALF
        yield proxy


def resume(proxy: Proxy) -> None:
    proxy.stall_after = 0


async def ask(
    session: aiohttp.ClientSession, source: str, id: str, new_tokens: int = NEW_TOKENS
) -> list[int]:
    """The tokens of the adapter's answer, or of the base model's without an `id`."""
    parameters: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "ignore_eos_token": new_tokens > NEW_TOKENS,
        "details": True,
    }
    if id:
        parameters |= {"adapter_id": id, "adapter_source": source}
    body = {"inputs": PROMPT, "parameters": parameters}
    async with session.post("/generate", json=body) as response:
        answer = await response.json()
        assert response.status == 200, answer
        return [token["id"] for token in answer["details"]["tokens"]]


async def killed(service: Service, module: str, when: Callable[[], bool]) -> None:
    """Kills one of the service's processes once that is so, and waits for the end of all."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not when():
        assert time.monotonic() < deadline, "the load did not come so far"
        await asyncio.sleep(0.002)
    everyone = psutil.Process(service.process.pid).children(recursive=True)
    process = children(service)[module]
    process.kill()
    assert when(), "the load came further before the kill"
    assert await asyncio.to_thread(service.process.wait, WAIT_SECONDS) != 0
    _, alive = await asyncio.to_thread(psutil.wait_procs, everyone, WAIT_SECONDS)
    assert not alive


async def interrupted(service: Service, slow: Slow, module: str, when: Callable[[], bool]) -> None:
    """Asks for the adapter and kills a process meanwhile."""
    try:
        async with service.session() as session:
            asking = asyncio.create_task(ask(session, slow.source, slow.id, 400))
            await killed(service, module, when)
            with pytest.raises((aiohttp.ClientError, AssertionError)):
                await asking
    finally:
        service.process.kill()


@pytest.mark.parametrize(
    ("slow", "module"),
    [("hub", "lorafleet.shard"), ("s3", "lorafleet.router"), ("http", "lorafleet.shard")],
    indirect=["slow"],
)
async def test_a_download_is_gone_on_with_and_counted_once(
    made: Made, slow: Slow, module: str, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    flags = (f"--adapter-cache-dir={cache}", "--adapter-disk-bytes=1MiB", *slow.flags)

    def arrived() -> list[Path]:
        names = (FILES[1], "archive")
        found = [path for name in names for path in cache.rglob(name) if path.exists()]
        return [path for path in found if path.stat().st_size > 0]

    service = start(made.model, tmp_path, *flags)
    await interrupted(service, slow, module, lambda: bool(arrived()))
    assert [path.relative_to(cache).parts[0] for path in arrived()] == [".partial"]
    slow.release()
    with serve(made.model, tmp_path, *flags) as service:
        assert service.metric("lorafleet_adapter_tier_bytes", tier="disk") == 0
        async with service.session() as session:
            async with session.get("/v1/models") as response:
                assert len((await response.json())["data"]) == 1, "half an adapter is listed"
            assert await ask(session, slow.source, slow.id) == made.answer
        assert_complete(made, cache)
        assert service.metric("lorafleet_adapter_tier_bytes", tier="disk") == size_of(made)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An adapter of 35 MB: beside a running stream it is packed at its pace, for a while."""
    return make_made(
        tmp_path_factory.mktemp("large"),
        Recipe("r512", 512, 8, ALL_LINEAR),
        hidden_size=512,
        intermediate_size=1024,
        initializer_range=0.05,
    )


@pytest.mark.parametrize("module", ["lorafleet.shard", "lorafleet.router"])
async def test_a_pack_begins_anew_from_what_was_downloaded(
    large: Made, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, id = tmp_path / "cache", "owner/r512"
    flags = (f"--adapter-cache-dir={cache}", "--adapter-disk-bytes=64MiB")
    with Hub().serve() as hub:
        hub.repos[id] = Repo(large.folder)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        service = start(large.model, tmp_path, *flags)
        async with service.session() as session:
            streams = asyncio.create_task(stream_until_the_end(session))
            with packing(service, AdapterKey("hub", id)) as is_packing:
                slow = Slow("hub", id, (), lambda: None)
                await interrupted(service, slow, module, is_packing)
            await streams
        with serve(large.model, tmp_path, *flags) as service:
            assert service.metric("lorafleet_adapter_tier_bytes", tier="disk") == size_of(large)
            async with service.session() as session:
                assert await ask(session, "hub", id) == large.answer
            assert_complete(large, cache)


async def stream_until_the_end(session: aiohttp.ClientSession) -> None:
    """The base model's answers one after the other, so that the shard is never without steps."""
    with suppress(aiohttp.ClientError, AssertionError):  # of the service
        while True:
            await ask(session, "hub", "", 400)


@contextmanager
def packing(service: Service, key: AdapterKey) -> Iterator[Callable[[], bool]]:
    """Has the shard fetch the adapter; whether it is in the midst of packing it.

    The block must end the shard. One whose router was killed has no more steps to be considerate
    of: it may yet come to the end of its pack before it is told to stop.
    """
    (address,) = shard_addresses(service)
    last: list[FetchProgress] = []

    def watch(channel: grpc.Channel) -> None:
        call = channel.unary_stream(
            "/lorafleet.v1.Shard/FetchAdapter",
            shard_pb2.FetchAdapterRequest.SerializeToString,
            shard_pb2.FetchProgress.FromString,
        )
        with suppress(grpc.RpcError):  # the shard was killed
            for progress in call(encode(FetchAdapterRequest(key, Tier.HOST))):
                last[:] = [decode(progress)]

    with grpc.insecure_channel(address) as channel:
        watching = Thread(target=watch, args=(channel,))
        watching.start()
        yield lambda: bool(last) and is_in_a_pack(last[0])
        watching.join()


def is_in_a_pack(progress: FetchProgress) -> bool:
    return progress.stage == "packing" and progress.done_bytes < progress.total_bytes


def size_of(made: Made) -> int:
    """Bytes of the adapter's files."""
    return sum((made.folder / name).stat().st_size for name in FILES)


def assert_complete(made: Made, cache: Path) -> None:
    """The download is whole, and nothing is left beside it."""
    for name in FILES:
        (path,) = cache.rglob(name)
        assert ".partial" not in path.parts
        assert path.read_bytes() == (made.folder / name).read_bytes()
    assert list(cache.rglob(".partial/*/*")) == []
