"""Two hundred adapters made to do harm, from a seed (LORAFLEET_SEED), against one service."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import aiohttp
import psutil
import pytest

from tests.cache.hub_stand_in import Hub, Repo
from tests.cache.web_server import WebServer
from tests.checkpoints import RECIPES, make_adapters, make_checkpoint
from tests.e2e.hostile import (
    Good,
    Hostile,
    archives,
    local_folders,
    local_ids,
    objects,
    repositories,
)
from tests.e2e.oracle import Oracle
from tests.e2e.questions import Question, ask, ids_of
from tests.e2e.s3_server import BUCKET, s3_server
from tests.e2e.service import Service, serve

SEED = int(os.environ.get("LORAFLEET_SEED", "4"))
GOOD, PROMPT, NEW_TOKENS = ("r8-attention", "r16-all"), "the quick brown fox", 12
NUM_ASKED_AT_ONCE = 8
MAX_SECONDS = 60  # for one refusal, on a machine that does other things as well
# Above what a process has after a first round. All local ones come a second time, so that what is
# kept for each grows again, while what the allocator keeps for the next does not.
MAX_PEAK_BYTES = 160 << 20
MAX_KEPT_BYTES = 80 << 20  # malloc keeps 5 to 45 MB of what was free between; one config has 100
REFUSALS = (403, 404, 422)


@dataclass
class Process:
    """One of the service's processes, and the most memory it has had."""

    process: psutil.Process
    name: str
    peak: int = 0
    at_rest: int = 0

    def look(self) -> int:
        """Bytes of memory it has now."""
        now = int(self.process.memory_info().rss)
        self.peak = max(self.peak, now)
        return now


@dataclass
class World:
    """The service, what it serves rightly, and where it keeps things."""

    service: Service
    root: Path
    good: list[Question]
    hostile: list[Hostile]
    answers: list[bool] = field(default_factory=list)  # of the good adapters: whether they agree

    def processes(self) -> list[Process]:
        """Router and shards."""
        found = psutil.Process(self.service.process.pid).children(recursive=True)
        return [Process(p, p.cmdline()[p.cmdline().index("-m") + 1]) for p in found]

    def on_disk(self) -> dict[str, int]:
        """Every file under the download directory, but for locks, with its size."""
        cache = self.root / "cache"
        paths = (path for path in cache.rglob("*") if path.is_file())
        return {
            str(path.relative_to(cache)): path.stat().st_size
            for path in paths
            if ".locks" not in path.parts and path.name != ".room"
        }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A service of two shards with every source."""
    root, random = tmp_path_factory.mktemp("hostile"), Random(SEED)
    model = make_checkpoint("llama", root / "model")
    recipes = tuple(recipe for recipe in RECIPES if recipe.name in GOOD)
    make_adapters(model, root / "adapters", recipes)
    oracle = Oracle(model, root / "adapters", list(GOOD))
    questions = [
        Question(PROMPT, name, NEW_TOKENS, oracle.answer(ids_of(PROMPT), name, NEW_TOKENS))
        for name in (*GOOD, None)
    ]
    good = Good(root / "adapters" / GOOD[0])
    (root / "web").mkdir()
    for name in (b"\xff\xfe", b"line\nbreak"):
        good.copy(root / "adapters" / os.fsdecode(name))
    with ExitStack() as stack:
        web = stack.enter_context(WebServer(root / "web" / "archives"))
        hub = stack.enter_context(Hub().serve())
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        s3 = stack.enter_context(s3_server(patch))
        hostile = [
            *local_folders(random, good, root / "adapters", 100),
            *local_ids(random, 8),
            *repositories(random, good, root / "repos", 36),
            *archives(random, good, root / "web" / "archives", f"{web.url}/files", 20),
            *objects(random, good, root / "objects", s3.put, BUCKET),
        ]
        for path in (root / "repos").iterdir():
            hub.repos[f"evil/{path.name}"] = Repo(path)
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        flags = (
            "--num-shard=2",
            f"--adapter-root={root / 'adapters'}",
            f"--adapter-cache-dir={root / 'cache'}",
            f"--adapter-http-hosts={web.host}",
            f"--adapter-s3-endpoint={s3.url}",
            f"--adapter-s3-buckets={BUCKET}",
            "--adapter-archive-bytes=64MiB",
            "--adapter-disk-bytes=256MiB",
        )
        with serve(model, root, *flags) as service:
            yield World(service, root, questions, hostile)


async def refuse(world: World, session: aiohttp.ClientSession, hostile: Hostile) -> str:
    """What is wrong with how the service refuses this adapter; empty if nothing is."""
    body = {
        "inputs": "a",
        "parameters": {
            "adapter_id": hostile.id,
            "adapter_source": hostile.source,
            "max_new_tokens": 2,
        },
    }
    try:
        async with asyncio.timeout(MAX_SECONDS), session.post("/generate", json=body) as response:
            answer = await response.json()
    except TimeoutError:
        return f"{hostile.name} {hostile.id}: no answer in {MAX_SECONDS} s"
    said = answer.get("error", "")
    is_refused = response.status in REFUSALS and re.search(hostile.words, said)
    is_discreet = len(said) < 1000 and "verysecret" not in said
    if is_refused and is_discreet:
        return ""
    return f"{hostile.name} {hostile.id}: {response.status} {said[:300]!r}, not {hostile.words!r}"


async def keep_asking(world: World, session: aiohttp.ClientSession) -> None:
    """Good questions, one after the other, until cancelled."""
    while True:
        for question in world.good:
            world.answers.append(await ask(session, question) == question.answer)


async def keep_looking(processes: list[Process]) -> None:
    """Watches memory until cancelled."""
    while True:
        for process in processes:
            process.look()
        await asyncio.sleep(0.02)


async def test_each_is_refused_and_nothing_stays_of_it(world: World) -> None:
    assert len(world.hostile) >= 200
    elsewhere = set(world.root.parent.rglob("*slipped*"))
    async with world.service.session() as session:
        await _warm_up(world, session)
        disk, used = world.on_disk(), _disk_bytes(world.service)
        processes = world.processes()
        for process in processes:
            process.at_rest = process.look()
        tasks = [
            asyncio.create_task(keep_asking(world, session)),
            asyncio.create_task(keep_looking(processes)),
        ]
        order = Random(SEED).sample(world.hostile, len(world.hostile))
        wrong = [said for said in await _refuse_all(world, session, order) if said]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not wrong, "\n".join(wrong)
        assert world.answers, "the good adapters were not asked meanwhile"
        assert all(world.answers)
        for question in world.good:
            assert await ask(session, question) == question.answer
        async with session.get("/v1/models") as response:
            assert response.status == 200, await response.text()
    assert world.on_disk() == disk
    assert _disk_bytes(world.service) == used
    assert not (world.root / "exploded").exists()
    assert set(world.root.parent.rglob("*slipped*")) == elsewhere
    report = [(p.name, (p.peak - p.at_rest) >> 20, (p.look() - p.at_rest) >> 20) for p in processes]
    print(report)
    for process in processes:
        assert process.peak - process.at_rest < MAX_PEAK_BYTES, report
        assert process.look() - process.at_rest < MAX_KEPT_BYTES, report


async def _refuse_all(
    world: World, session: aiohttp.ClientSession, hostile: list[Hostile]
) -> list[str]:
    room = asyncio.Semaphore(NUM_ASKED_AT_ONCE)

    async def refused(each: Hostile) -> str:
        async with room:
            return await refuse(world, session, each)

    return await asyncio.gather(*map(refused, hostile))


async def _warm_up(world: World, session: aiohttp.ClientSession) -> None:
    """Libraries are loaded and memory is taken that serves the next: what may not grow is the rest.

    What is refused for a download is remembered, so that comes once of each kind only.
    """
    for question in world.good:
        assert await ask(session, question) == question.answer
    kinds = {(hostile.name, hostile.source): hostile for hostile in world.hostile}
    local = [hostile for hostile in world.hostile if hostile.source == "local"]
    await _refuse_all(world, session, [*kinds.values(), *local])


def _disk_bytes(service: Service) -> float:
    return service.metric("lorafleet_adapter_tier_bytes", tier="disk")
