"""From outcomes to numbers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from lorafleet.deploy.bench.client import Outcome
from lorafleet.deploy.bench.report import percentiles, print_summary, summarize, write_json


def outcome(sent: float, *arrivals: float, error: str = "") -> Outcome:
    end = arrivals[-1] if arrivals else sent
    return Outcome("a", sent, list(arrivals), end, 7, len(arrivals), "text", error)


def test_percentiles_are_nearest_ranks() -> None:
    assert percentiles([i / 1e3 for i in range(1, 101)]) == pytest.approx(
        {"p50": 50, "p90": 90, "p99": 99}
    )
    assert percentiles([0.004]) == {"p50": 4, "p90": 4, "p99": 4}
    assert percentiles([]) == {}


def test_a_run_in_numbers() -> None:
    summary = summarize([outcome(0.0, 1.0, 2.0, 4.0), outcome(1.0, 2.0, error="429: busy")])
    assert (summary["requests"], summary["failed"]) == (1, 1)
    assert summary["failures"] == {"429: busy": 1}
    assert (summary["output_tokens"], summary["prompt_tokens"]) == (3, 7)
    assert summary["seconds"] == 4.0
    assert summary["output_tokens_per_second"] == 0.75
    assert summary["ttft_ms"]["p50"] == 1000
    assert summary["inter_token_ms"] == {"p50": 1000, "p90": 2000, "p99": 2000}


def printed(*outcomes: Outcome) -> str:
    screen = io.StringIO()
    print_summary(Console(file=screen, width=120), summarize(outcomes))
    return screen.getvalue()


def test_one_is_not_many() -> None:
    assert ": 1 request, 2 tokens, 1 adapter in 4.0 s" in printed(outcome(0.0, 1.0, 4.0))
    assert ": 2 requests, 3 tokens, 1" in printed(outcome(0.0, 1.0), outcome(1.0, 2.0, 3.0))


def test_a_run_that_failed_altogether_shows_why_and_nothing_else() -> None:
    refused, busy = (outcome(0.0, error=error) for error in ("connection [refused]", "429: busy"))
    lines = ["every request failed", "2 failed: connection [refused]", "1 failed: 429: busy"]
    assert printed(refused, refused, busy).splitlines() == lines


def test_the_file_says_what_when_and_where_from(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    write_json(file, {"seed": 1}, summarize([outcome(0.0, 1.0)]))
    written = json.loads(file.read_text())
    assert written["config"] == {"seed": 1}
    assert written["results"]["requests"] == 1
    assert {"date", "commit"} <= set(written)
