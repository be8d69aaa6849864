"""A thousand adapters of a hub on a service with room for sixteen, as peft answers them."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from lorafleet.proto.flags import Bytes
from tests.checkpoints import make_checkpoint
from tests.e2e.budgets import Budgets
from tests.e2e.many_adapters import Popularity, write_many
from tests.e2e.oracle import Oracle
from tests.e2e.questions import Question, ask_hub, ids_of, text
from tests.e2e.service import serve

NUM_ADAPTERS = int(os.environ.get("LORAFLEET_ADAPTERS", "1000"))
NUM_REQUESTS = int(os.environ.get("LORAFLEET_REQUESTS", "400"))
NUM_CONCURRENT, NUM_SAMPLED, NEW_TOKENS = 64, 200, 6
SLOTS = 16
DEVICE, HOST, DISK = Bytes("512KiB"), Bytes("1536KiB"), Bytes("3MiB")

pytestmark = pytest.mark.timeout(900)  # the larger one, and machines that do other things as well


@contextmanager
def hub_of(root: Path) -> Iterator[str]:
    """The address of a hub stand-in, a process of its own, with every root/OWNER/NAME."""
    command = [sys.executable, "-m", "tests.cache.hub_stand_in", str(root)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        yield process.stdout.readline().strip()
        process.stdin.close()


async def test_a_thousand_adapters_answer_as_peft_does_within_every_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = Random(11)
    model = make_checkpoint("llama", tmp_path / "model")
    root = tmp_path / "hub" / "many"
    names = write_many(model, root, NUM_ADAPTERS)
    asked = Popularity(random.sample(names, len(names))).draw(random, NUM_REQUESTS)
    questions = [
        Question(text(random, random.randint(4, 40)), name, NEW_TOKENS, []) for name in asked
    ]
    cache = tmp_path / "cache"
    budgets = Budgets(SLOTS, DEVICE, HOST, DISK, cache)
    flags = (
        f"--max-active-adapters={SLOTS}",
        f"--adapter-device-bytes={DEVICE}",
        f"--adapter-host-bytes={HOST}",
        f"--adapter-disk-bytes={DISK}",
        f"--adapter-cache-dir={cache}",
    )
    with hub_of(tmp_path / "hub") as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        with serve(model, tmp_path, *flags) as service, budgets.watched(service):
            room = asyncio.Semaphore(NUM_CONCURRENT)
            async with service.session() as session:

                async def answer(question: Question) -> list[int]:
                    async with room:
                        return await ask_hub(session, question, "many")

                answers = await asyncio.gather(*map(answer, questions))
            evicted = {
                tier: service.metric("lorafleet_adapter_evictions_total", tier=tier)
                for tier in ("device", "host", "disk")
            }
    assert all(evicted.values()), evicted  # else no budget was of importance
    assert len({str(answer) for answer in answers}) > len(set(asked)) // 2, "adapters do nothing"
    picked = random.sample(range(NUM_REQUESTS), min(NUM_SAMPLED, NUM_REQUESTS))
    wrong = _differing(model, root, [questions[i] for i in picked], [answers[i] for i in picked])
    assert not wrong, wrong
    print(json.dumps({"most": budgets.most, "looks": budgets.num_looks, "evicted": evicted}))


def _differing(
    model: Path, root: Path, questions: list[Question], answers: list[list[int]]
) -> list[str]:
    """Questions that peft answers otherwise."""
    order = sorted(zip(questions, answers, strict=True), key=lambda pair: str(pair[0].adapter))
    oracle = Oracle(model, root, [str(order[0][0].adapter)])
    wrong = []
    for question, answer in order:
        name = str(question.adapter)
        oracle.load_only(root, name)
        expected = oracle.answer(ids_of(question.prompt), name, question.max_new_tokens)
        if answer != expected:
            wrong.append(f"{name} {question.prompt!r}: {answer}, peft {expected}")
    return wrong
