"""Shard or router killed during a load: the next start repairs, and serves no half file."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import boto3
import psutil
import pytest
from botocore.config import Config
from moto.server import ThreadedMotoServer

from tests.cache.archive_cases import FILES, tar_of
from tests.cache.hub_stand_in import Hub, Repo
from tests.cache.proxy import Proxy
from tests.cache.web_server import WebServer
from tests.checkpoints import RECIPES, make_adapters, make_checkpoint
from tests.e2e.oracle import Oracle
from tests.e2e.questions import ids_of
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
    root = tmp_path_factory.mktemp("killed")
    model = make_checkpoint("llama", root / "model")
    make_adapters(model, root / "adapters", tuple(r for r in RECIPES if r.name == NAME))
    oracle = Oracle(model, root / "adapters", [NAME])
    answer = oracle.answer(ids_of(PROMPT), NAME, NEW_TOKENS)
    return Made(model, root / "adapters" / NAME, answer)


@dataclass
class Slow:
    """A source that sends half of the weights, until it is `released`."""

    source: str
    id: str
    flags: tuple[str, ...]
    release: Callable[[], None]
    file: str = FILES[1]  # as it is called while it comes


@pytest.fixture
def slow(
    request: pytest.FixtureRequest, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Slow]:
    sources: dict[str, AbstractContextManager[Slow]] = {
        "hub": slow_hub(made, monkeypatch),
        "s3": slow_s3(made, monkeypatch),
        "http": slow_http(made, tmp_path / "web"),
    }
    with sources[request.param] as source:
        yield source


@contextmanager
def slow_hub(made: Made, patch: pytest.MonkeyPatch) -> Iterator[Slow]:
    with Hub().serve() as hub:
        repo = hub.repos[f"owner/{NAME}"] = Repo(made.folder, first_bytes=HALF)
        repo.gate.clear()
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        yield Slow("hub", f"owner/{NAME}", (), repo.gate.set)


@contextmanager
def slow_s3(made: Made, patch: pytest.MonkeyPatch) -> Iterator[Slow]:
    for name, value in _CREDENTIALS.items():
        patch.setenv(name, value)
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    config = Config(s3={"addressing_style": "path"})
    client = boto3.client("s3", "us-east-1", endpoint_url=url, config=config)
    client.create_bucket(Bucket="adapters")
    for name in FILES:
        body = (made.folder / name).read_bytes()
        client.put_object(Bucket="adapters", Key=f"team/{NAME}/{name}", Body=body)
    with stalled(url) as (proxy, release):
        flags = (f"--adapter-s3-endpoint={proxy.url}",)
        yield Slow("s3", f"s3://adapters/team/{NAME}", flags, release)
    server.stop()


@contextmanager
def slow_http(made: Made, root: Path) -> Iterator[Slow]:
    root.mkdir()
    files = {name: (made.folder / name).read_bytes() for name in FILES}
    (root / "adapter.tar.gz").write_bytes(tar_of(files))
    with WebServer(root) as web, stalled(web.url) as (proxy, release):
        flags = (f"--adapter-http-hosts={proxy.host}",)
        yield Slow("http", f"{proxy.url}/files/adapter.tar.gz", flags, release, "archive")


@contextmanager
def stalled(url: str) -> Iterator[tuple[Proxy, Callable[[], None]]]:
    """A proxy that passes so much on, and what lets it pass on all."""
    with Proxy(url) as proxy:
        proxy.stall_after = HALF

        def release() -> None:
            proxy.stall_after = 0

        yield proxy, release


_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "example",
    "AWS_EC2_METADATA_DISABLED": "true",
}


async def ask(
    session: aiohttp.ClientSession, source: str, id: str, new_tokens: int = NEW_TOKENS
) -> list[int]:
    """The tokens of the adapter's answer."""
    parameters = {
        "adapter_id": id,
        "adapter_source": source,
        "max_new_tokens": new_tokens,
        "ignore_eos_token": new_tokens > NEW_TOKENS,
        "details": True,
    }
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
    children(service)[module].kill()
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
    [
        ("hub", "lorafleet.shard"),
        ("s3", "lorafleet.router"),
        ("http", "lorafleet.shard"),
    ],
    indirect=["slow"],
)
async def test_a_download_is_gone_on_with_and_counted_once(
    made: Made, slow: Slow, module: str, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    flags = (f"--adapter-cache-dir={cache}", "--adapter-disk-bytes=1MiB", *slow.flags)

    def has_begun() -> bool:
        begun = [path for path in cache.rglob(slow.file) if path.exists()]
        return bool(begun) and begun[0].stat().st_size > 0

    await interrupted(start(made.model, tmp_path, *flags), slow, module, has_begun)
    left = list(cache.rglob(slow.file))
    assert [path.relative_to(cache).parts[0] for path in left] == [".partial"]
    slow.release()
    with serve(made.model, tmp_path, *flags) as service:
        assert service.metric("lorafleet_adapter_tier_bytes", tier="disk") == 0
        async with service.session() as session:
            async with session.get("/v1/models") as response:
                assert len((await response.json())["data"]) == 1, "half an adapter is listed"
            assert await ask(session, slow.source, slow.id) == made.answer
        assert_complete(made, cache)
        assert service.metric("lorafleet_adapter_tier_bytes", tier="disk") == size_of(made)


@pytest.mark.parametrize("module", ["lorafleet.shard", "lorafleet.router"])
async def test_a_pack_begins_anew_from_what_was_downloaded(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    cache = tmp_path / "cache"
    flags = (f"--adapter-cache-dir={cache}", "--adapter-disk-bytes=1MiB")
    with Hub().serve() as hub:
        hub.repos[f"owner/{NAME}"] = Repo(made.folder)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        slow = Slow("hub", f"owner/{NAME}", (), lambda: None)
        service = start(made.model, tmp_path, *flags)
        await interrupted(service, slow, module, lambda: bool([*cache.glob("hub/*/download.json")]))
        with serve(made.model, tmp_path, *flags) as service:
            assert service.metric("lorafleet_adapter_tier_bytes", tier="disk") == size_of(made)
            async with service.session() as session:
                assert await ask(session, slow.source, slow.id) == made.answer
            assert_complete(made, cache)


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
