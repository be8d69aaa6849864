"""What a cold adapter costs on a busy server: its own first token, and the others' rhythm (E12)."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

import aiohttp

from lorafleet.deploy.bench.client import BASE, Outcome, Target
from lorafleet.deploy.bench.report import percentiles
from lorafleet.deploy.bench.workload import Ask
from tests.bench.gpu.adapter_folders import drop_from_page_cache, write_adapters
from tests.bench.gpu.reports import Row
from tests.bench.gpu.server import Server, running_server
from tests.bench.gpu.shapes import Shape
from tests.bench.gpu.streams import connection, prompt

# Two places on the device, so that an adapter of five is back in host memory when its turn comes.
_FLAGS = ("--max-active-adapters", "2", "--no-prefix-caching")
_TIERS = ("none", "device", "host", "disk")


@dataclass(frozen=True, slots=True)
class Plan:
    """`streams` of the base model beside one request at a time; lengths in tokens."""

    streams: int = 32
    stream_tokens: int = 3600
    prompt_tokens: int = 400
    ranks: tuple[int, ...] = (16, 64)
    adapters: int = 5  # of each rank
    window_seconds: float = 0.25  # after a request was sent, in which the others are watched


@dataclass(frozen=True, slots=True)
class _Probe:
    """One request, where its adapter was, and the time until its first token."""

    rank: int
    tier: str
    outcome: Outcome


def tiers(shape: Shape, plan: Plan = Plan()) -> list[Row]:
    """First tokens of adapters on the device, in host memory and on disk, and of the base model.

    The tier is the one /v1/models names right before the request. Files were dropped from the
    page cache first, where the file system heeds that.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "adapters")
        for rank in plan.ranks:
            write_adapters(shape, root, _names(plan, rank), rank)
        drop_from_page_cache(root)
        with running_server(shape, Path(folder), _FLAGS) as server:
            streams, probes = asyncio.run(_measure(server, plan))
    return _rows(shape, plan, streams, probes)


def _names(plan: Plan, rank: int) -> list[str]:
    return [f"r{rank}-{i}" for i in range(plan.adapters)]


async def _measure(server: Server, plan: Plan) -> tuple[list[Outcome], list[_Probe]]:
    streams: list[Outcome] = []
    async with connection(server.url, server.model) as target:
        await _send(target, server, BASE, plan)
        background = [
            asyncio.create_task(_keep_going(target, server, plan, number, streams))
            for number in range(plan.streams)
        ]
        await _all_flow(streams, plan.streams)
        await asyncio.sleep(2 * plan.window_seconds)  # a quiet stretch to compare with
        probes = [
            probe for rank in plan.ranks for probe in await _cycle(target, server, plan, rank)
        ]
        for task in background:
            task.cancel()
        for task in background:
            with suppress(asyncio.CancelledError):
                await task
    return streams, probes


async def _all_flow(streams: list[Outcome], count: int) -> None:
    """Until every stream has had a token."""
    while sum(bool(each.arrivals) for each in streams) < count:  # noqa: ASYNC110
        await asyncio.sleep(0.05)


async def _keep_going(
    target: Target, server: Server, plan: Plan, seed: int, streams: list[Outcome]
) -> None:
    """One stream of the base model after another, until it is cancelled."""
    random = Random(seed)
    while True:
        streams.append(Outcome(BASE, time.perf_counter()))
        ids = prompt(plan.prompt_tokens, server.vocab_size, random)
        await target.fill(streams[-1], Ask(BASE, ids, plan.stream_tokens))
        if streams[-1].error:
            raise RuntimeError(f"a stream of the base model: {streams[-1].error}")


async def _cycle(target: Target, server: Server, plan: Plan, rank: int) -> list[_Probe]:
    """Every adapter from disk; then, each in its turn, from host memory and from the device."""
    probes = []
    names = _names(plan, rank)
    asked = [*names, *(name for name in names for _ in range(2))]
    asked += [BASE] * plan.adapters
    for name in asked:
        tier = "none" if name == BASE else await _tier(server, name)
        outcome = await _send(target, server, name, plan)
        probes.append(_Probe(rank, tier, outcome))
        await asyncio.sleep(
            max(0.0, outcome.sent_at + 2 * plan.window_seconds - time.perf_counter())
        )
    return probes


async def _send(target: Target, server: Server, adapter: str, plan: Plan) -> Outcome:
    ids = prompt(plan.prompt_tokens, server.vocab_size, Random())
    outcome = await target.send(Ask(adapter, ids, 1))
    if outcome.error:
        raise RuntimeError(f"adapter {adapter}: {outcome.error}")
    return outcome


async def _tier(server: Server, name: str) -> str:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{server.url}/v1/models") as response,
    ):
        cards = (await response.json())["data"]
    return str(next(card["tier"] for card in cards if card["root"] == name))


def _rows(
    shape: Shape, plan: Plan, streams: Sequence[Outcome], probes: Sequence[_Probe]
) -> list[Row]:
    windows = {id(probe): _window(probe, plan) for probe in probes}
    quiet = _gaps(streams, plan.streams, list(windows.values()), inside=False)
    rows: list[Row] = []
    for rank in plan.ranks:
        device: Row = {}
        for tier in _TIERS:
            picked = [probe for probe in probes if (probe.rank, probe.tier) == (rank, tier)]
            if not picked:
                continue
            firsts = [1e3 * probe.outcome.first_token_seconds for probe in picked]
            watched = [windows[id(probe)] for probe in picked]
            gaps = _gaps(streams, plan.streams, watched, inside=True)
            row: Row = {
                "what": tier, "rank": rank, "streams": plan.streams, "requests": len(picked),
                "ttft_ms": statistics.median(firsts), "ttft_max_ms": max(firsts),
                "quiet_ms": statistics.mean(quiet), "quiet_p50_ms": statistics.median(quiet),
                "others_ms": statistics.mean(gaps), "others_p50_ms": statistics.median(gaps),
                "others_p99_ms": percentiles([gap / 1e3 for gap in gaps])["p99"],
                "others_over_quiet": statistics.mean(gaps) / statistics.mean(quiet),
            }  # fmt: skip
            device = row if tier == "device" else device
            if device:
                row["over_device_ms"] = row["ttft_ms"] - device["ttft_ms"]
                row["others_over_device"] = row["others_ms"] / device["others_ms"]
            rows.append(row)
            print(_line(shape, row), flush=True)
    return rows


def _window(probe: _Probe, plan: Plan) -> tuple[float, float]:
    sent, first = probe.outcome.sent_at, probe.outcome.arrivals[0]
    return sent, max(first, sent + plan.window_seconds)


def _gaps(
    streams: Sequence[Outcome],
    started: int,
    windows: Sequence[tuple[float, float]],
    *,
    inside: bool,
) -> list[float]:
    """Milliseconds between the tokens of the streams whose later one came inside any window.

    Counted from when all of the first `started` streams were past their prompts.
    """
    settled = max(stream.arrivals[0] for stream in streams[:started])
    return [
        1e3 * (after - before)
        for stream in streams
        for before, after in pairwise(stream.arrivals)
        if before > settled and any(start <= after <= stop for start, stop in windows) == inside
    ]


def _line(shape: Shape, row: Row) -> str:
    over = f" ({row['over_device_ms']:+.1f})" if "over_device_ms" in row else ""
    return (
        f"{shape.name} r{row['rank']:<3} adapter on {row['what']:6} first token "
        f"{row['ttft_ms']:6.1f} ms{over:10} others {row['others_ms']:5.2f} ms, "
        f"quiet {row['quiet_ms']:5.2f}  x{row['others_over_quiet']:4.2f}"
    )
