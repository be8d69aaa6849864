"""The `http` part of `make gpu` against a real service of a tiny model on the CPU."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

import pytest

from lorafleet.deploy.bench.workload import Ask
from tests.bench.gpu.adapter_folders import write_adapters
from tests.bench.gpu.answers import Pair, likely_tokens, margin
from tests.bench.gpu.over_http import Plan, measure_server
from tests.bench.gpu.peers import other_server
from tests.bench.gpu.reports import Report
from tests.bench.gpu.same_load import engine_alone
from tests.bench.gpu.server import running_server
from tests.bench.gpu.shapes import SHAPES
from tests.bench.gpu.streams import Load, prompt

TINY = SHAPES["llama-tiny"]
LOAD = Load(streams=4, rounds=1, prompt_tokens=24, output_tokens=8)
NAMES = ["a0", "a1", "a2"]


def test_a_server_is_measured_and_its_answers_checked(tmp_path: Path) -> None:
    write_adapters(TINY, tmp_path / "adapters", NAMES, 16)
    alone = engine_alone(TINY, LOAD, 3)
    Report("alone", TINY.name, "CPU", "", 1.0, 1.0, alone).write(tmp_path)
    with running_server(TINY, tmp_path, ["--no-prefix-caching"]) as server:
        rows = measure_server(server, NAMES, TINY, tmp_path, Plan(LOAD, 3, checked=3))
        peer = other_server(TINY, server.url, LOAD)
        ask = Ask("a0", prompt(24, TINY.vocab_size, Random(0)), 8)
        likely = asyncio.run(likely_tokens(server, ask, [7]))
        best, second, *_ = sorted(likely, key=lambda token: -likely[token])
        far = next(token for token in range(TINY.vocab_size) if token not in likely)
        tie = asyncio.run(margin(server, Pair(ask, [7, second], [7, best])))
        unlikely = asyncio.run(margin(server, Pair(ask, [7, far], [7, best])))
    assert server.start_seconds > 0
    assert [row["what"] for row in rows] == ["base", "one shared r16", "3 adapters r16", "answers"]
    assert all(row["requests"] == 4 and row["tokens_per_s"] > 0 for row in rows[:3])
    assert rows[1]["retention"] > 0
    for row, engine in zip(rows, alone, strict=False):
        assert row["of_engine"] == pytest.approx(row["tokens_per_s"] / engine["tokens_per_s"])
    checked = rows[3]
    assert (checked["equal"], checked["wrong"], checked["like_base"]) == (3, 0, 0)
    assert [row["what"] for row in peer] == [
        "server, base", "server, one shared", "server, 3 adapters",
    ]  # fmt: skip
    assert tie == pytest.approx(likely[best] - likely[second])
    assert unlikely is None
