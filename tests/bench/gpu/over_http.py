"""The whole service from outside: start-up, throughput, latency, and whether answers are right."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorafleet.deploy.bench.client import BASE, Outcome
from lorafleet.deploy.bench.workload import Ask
from tests.bench.gpu.adapter_folders import write_adapters
from tests.bench.gpu.answers import check_answers
from tests.bench.gpu.reports import Row, find_row, read_reports
from tests.bench.gpu.server import Server, running_server
from tests.bench.gpu.shapes import Shape
from tests.bench.gpu.streams import Load, describe, line, send

RANK = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is asked of the server."""

    load: Load = field(default_factory=Load)
    adapters: int = 32
    checked: int = 16  # answers that are asked for again, alone


def over_http(shape: Shape, out: Path, plan: Plan = Plan()) -> list[Row]:
    """Start-up, then `measure_server` of a server of random weights and adapters.

    Prefix caching is off: an answer that is asked for again must be computed again.
    """
    names = [f"a{i}" for i in range(plan.adapters)]
    with tempfile.TemporaryDirectory() as folder:
        write_adapters(shape, Path(folder, "adapters"), names, RANK)
        with running_server(shape, Path(folder), ["--no-prefix-caching"]) as server:
            print(f"{shape.name} ready after {server.start_seconds:.1f} s", flush=True)
            start: Row = {"what": "start-up", "seconds": server.start_seconds}
            return [start, *measure_server(server, names, shape, out, plan)]


def measure_server(
    server: Server, names: Sequence[str], shape: Shape, out: Path, plan: Plan
) -> list[Row]:
    """Base only, one shared adapter and all of them, at the same load; then answers alone.

    `out` may hold the engine's own report of this shape, for the share of it that arrives.
    """
    rows: list[Row] = []
    _warm_up(server, [BASE, *names], plan.load)
    for what, adapters in (
        ("base", [BASE]),
        (f"one shared r{RANK}", names[:1]),
        (f"{len(names)} adapters r{RANK}", names),
    ):
        asks = plan.load.asks(adapters, shape.vocab_size, seed=1 + len(rows))
        outcomes = send(server.url, server.model, asks, plan.load.streams)
        row = describe(what, plan.load, outcomes)
        rows.append(row | _beside(row, rows, shape, out))
        print(line(shape.name, row), flush=True)
    rows.append(check_answers(server, names, plan.load, plan.checked))
    print(rows[-1], flush=True)
    return rows


def _warm_up(server: Server, adapters: Sequence[str], load: Load) -> list[Outcome]:
    """Every adapter is on the device afterwards, and every kind of step has run."""
    rounds = -(-len(adapters) // load.streams)
    short = Load(load.streams, rounds, load.prompt_tokens, 8)
    asks: list[Ask] = short.asks(adapters, server.vocab_size, seed=1000)
    return send(server.url, server.model, asks, load.streams)


def _beside(row: Row, before: Sequence[Row], shape: Shape, out: Path) -> Row:
    """Retention of this server's base-only throughput; the share of what the engine does alone."""
    beside: Row = {}
    base = next((each for each in before if each["what"] == "base"), None)
    if base is not None:
        beside["retention"] = row["tokens_per_s"] / base["tokens_per_s"]
    engine = find_row(
        read_reports(out), "alone", shape.name, what=row["what"], streams=row["streams"]
    )
    if engine is not None:
        beside["engine_tokens_per_s"] = engine["tokens_per_s"]
        beside["of_engine"] = row["tokens_per_s"] / engine["tokens_per_s"]
    return beside
