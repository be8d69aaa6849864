"""The plans of the benchmark's closed loop, run by a real engine of a tiny model."""

from __future__ import annotations

from collections import defaultdict

import pytest

from lorafleet.proto.messages import StepPlan
from lorafleet.shard.config import PAGE_SIZE
from lorafleet.shard.worker import Launched
from tests.bench.gpu import fidelity, mixed_decode
from tests.bench.gpu.closed_loop import ClosedLoop
from tests.bench.gpu.engine import Engine
from tests.bench.gpu.popularity import punica_requests
from tests.bench.gpu.shapes import SHAPES

TINY = SHAPES["llama-tiny"]
BATCH, MAX_TOKENS, ADAPTERS = 4, 48, 9


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[StepPlan]:
    found: list[StepPlan] = []
    launch = Engine.launch

    def spy(engine: Engine, plan: StepPlan) -> Launched:
        found.append(plan)
        return launch(engine, plan)

    monkeypatch.setattr(Engine, "launch", spy)
    return found


def test_plans_are_such_as_the_router_makes(plans: list[StepPlan]) -> None:
    engine = Engine.build(TINY, BATCH, MAX_TOKENS, ADAPTERS, ADAPTERS * TINY.packed_bytes(4))
    engine.load_adapters([4] * ADAPTERS)
    requests = punica_requests("uniform", 20, MAX_TOKENS)
    steps = ClosedLoop(engine, BATCH, MAX_TOKENS).run(requests)
    started: list[tuple[int, int]] = []
    pages: dict[int, list[int]] = defaultdict(list)
    positions: dict[int, int] = {}
    for plan, step in zip(plans, steps, strict=True):
        started += _start(plan, pages, positions)
        _check_columns(plan, pages, positions)
        assert step.new_tokens == len(plan.rows) <= BATCH
        assert step.adapters == len(set(plan.slots))
        assert step.kv_tokens == sum(positions[row] for row in plan.rows)
    # The run ends as soon as a row finds no request, so the last few may not have begun.
    assert len(started) > len(requests) - BATCH
    asked = [(each.adapter, each.prompt_tokens) for each in requests[: len(started)]]
    assert sorted(started) == sorted(asked)


def _start(
    plan: StepPlan, pages: dict[int, list[int]], positions: dict[int, int]
) -> list[tuple[int, int]]:
    slots = dict(zip(plan.rows, plan.slots, strict=True))
    for start in plan.starts:
        pages[start.row] = []
        positions[start.row] = 0
    return [(slots[start.row], start.num_prompt_tokens) for start in plan.starts]


def _check_columns(plan: StepPlan, pages: dict[int, list[int]], positions: dict[int, int]) -> None:
    new = iter(plan.pages)
    for row, first, count, fresh in zip(
        plan.rows, plan.first_positions, plan.token_counts, plan.new_page_counts, strict=True
    ):
        assert positions[row] == first
        positions[row] += count
        pages[row] += [next(new) for _ in range(fresh)]
        assert len(pages[row]) == -(-positions[row] // PAGE_SIZE)
    assert not list(new)
    held = [page for row in plan.rows for page in pages[row]]
    assert len(held) == len(set(held))
    for part in (plan.slots[: plan.num_prefills], plan.slots[plan.num_prefills :]):
        assert part == sorted(part)


def test_a_number_of_tokens_ends_a_run() -> None:
    rows = mixed_decode.over_adapters(TINY, new_tokens=64, batch=8, adapter_counts=(1, 8))
    assert [(row["what"], row["adapters"]) for row in rows] == [
        ("q/v", 1), ("q/v", 8), ("all-linear", 1), ("all-linear", 8),
    ]  # fmt: skip
    assert all(56 <= row["new_tokens"] <= 64 for row in rows)
    assert rows[0]["ratio"] == pytest.approx(1)


def test_popularities_are_compared_with_the_base_model() -> None:
    rows = mixed_decode.popularity(TINY, requests=12, batches=(4,), max_tokens=32)
    assert [row["what"] for row in rows] == [
        "base", "distinct", "uniform", "skewed", "identical",
    ]  # fmt: skip
    distinct = {row["what"]: row["distinct"] for row in rows}
    assert (distinct["base"], distinct["distinct"], distinct["identical"]) == (0, 4, 1)
    assert rows[0]["retention"] == 1


def test_fidelity_finds_an_adapter_that_is_not_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row["what"]: row for row in fidelity.fidelity(TINY, batch=9)}
    assert rows["base, B=9"]["over_bf16"] < 2
    assert rows["r16, B=9"]["over_bf16"] < 2
    dense = fidelity._dense
    monkeypatch.setattr(fidelity, "_dense", lambda weight: 1.1 * dense(weight))
    assert fidelity.fidelity(TINY, batch=9)[2]["over_bf16"] > 4
