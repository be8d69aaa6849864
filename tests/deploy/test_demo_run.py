"""How the demo reads the service's numbers and judges its own run."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import lorafleet.deploy.demo.__main__ as demo
from lorafleet.deploy.bench.client import Outcome
from lorafleet.deploy.demo.recipe import ADAPTERS
from lorafleet.deploy.demo.run import Results, asks, read_gauge, show

EXPOSITION = """# HELP lorafleet_step_adapters_max Most adapters in one of the last steps.
# TYPE lorafleet_step_adapters_max gauge
lorafleet_step_adapters_max 4.0
lorafleet_step_adapters_max_ever 9.0
"""
CARDS = [{"id": a.names[0], "parent": "m", "tier": "device", "rank": a.rank} for a in ADAPTERS]


def results(step_adapters: int = 4, error: str = "") -> Results:
    outcomes = [Outcome(a.adapter, 0.0, [0.5], 2.0, 5, 8, "[bold] text", error) for a in asks()]
    return Results(asks(), outcomes, step_adapters, CARDS)


def test_a_gauge_is_found_by_its_whole_name() -> None:
    assert read_gauge(EXPOSITION, "lorafleet_step_adapters_max") == 4.0
    assert read_gauge(EXPOSITION, "lorafleet_step_adapters") == 0.0


def test_a_good_run_has_no_problem() -> None:
    assert results().problems() == []


def test_what_counts_as_a_problem() -> None:
    assert results(step_adapters=3).problems() == ["at most 3 adapters shared a step"]
    assert len(results(error="404: no such adapter").problems()) == len(asks())
    unlisted = Results(asks(), results().outcomes, 4, CARDS[1:])
    assert unlisted.problems() == [f"/v1/models does not list {ADAPTERS[0].names[0]}"]


def test_ctrl_c_is_told_by_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["demo"])
    monkeypatch.setattr(demo, "_build", interrupted)
    assert demo.main() == 130


def test_the_table_shows_everything() -> None:
    screen = io.StringIO()
    show(Console(file=screen, width=200), results())
    text = screen.getvalue()
    assert "[bold] text" in text
    assert "4 different adapters shared one step" in text
    assert "500" in text  # milliseconds to the first token
    for adapter in ADAPTERS:
        assert adapter.names[0] in text
    assert "device" in text
