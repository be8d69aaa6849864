"""From outcomes to numbers, a table and a JSON file."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lorafleet.deploy.bench.client import Outcome

PERCENTILES = (50, 90, 99)


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Throughput over the whole run and percentiles in ms, of the requests that worked."""
    good = [outcome for outcome in outcomes if not outcome.error]
    failures = Counter(outcome.error for outcome in outcomes if outcome.error)
    start = min((outcome.sent_at for outcome in outcomes), default=0.0)
    seconds = max((outcome.finished_at for outcome in outcomes), default=0.0) - start
    output_tokens = sum(outcome.output_tokens for outcome in good)
    return {
        "requests": len(good),
        "failed": sum(failures.values()),
        "failures": dict(failures),
        "adapters": len({outcome.adapter for outcome in good}),
        "seconds": seconds,
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in good),
        "output_tokens": output_tokens,
        "output_tokens_per_second": output_tokens / seconds if seconds else 0.0,
        "requests_per_second": len(good) / seconds if seconds else 0.0,
        "ttft_ms": percentiles([outcome.first_token_seconds for outcome in good]),
        "inter_token_ms": percentiles([gap for outcome in good for gap in outcome.gaps]),
        "end_to_end_ms": percentiles([outcome.total_seconds for outcome in good]),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99 in milliseconds, the nearest rank of each; empty without values."""
    ordered = sorted(seconds)
    return {
        f"p{p}": 1e3 * ordered[max(0, -(-len(ordered) * p // 100) - 1)]
        for p in PERCENTILES
        if ordered
    }


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """The numbers a reader wants first, if there are any, and what failed."""
    if summary["requests"]:
        console.print(_times(summary))
        console.print(
            f"{summary['output_tokens_per_second']:,.1f} tokens/s, "
            f"{summary['requests_per_second']:,.2f} requests/s: "
            f"{_count(summary['requests'], 'request')}, "
            f"{_count(summary['output_tokens'], 'token')}, "
            f"{_count(summary['adapters'], 'adapter')} in {summary['seconds']:.1f} s"
        )
    elif summary["failed"]:
        console.print("every request failed", style="red")
    for error, count in summary["failures"].items():
        console.print(f"{count} failed: {error}", style="red", markup=False)


def _times(summary: dict[str, Any]) -> Table:
    table = Table(title=None, header_style="bold")
    table.add_column("")
    for p in PERCENTILES:
        table.add_column(f"p{p}", justify="right")
    for name, title in (
        ("ttft_ms", "time to first token, ms"),
        ("inter_token_ms", "between tokens, ms"),
        ("end_to_end_ms", "whole request, ms"),
    ):
        table.add_row(title, *(f"{value:,.1f}" for value in summary[name].values()))
    return table


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def write_json(file: Path, config: dict[str, Any], summary: dict[str, Any]) -> None:
    """The run as one JSON object: config, results, date, commit."""
    body = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "config": config,
        "results": summary,
    }
    file.write_text(json.dumps(body, indent=2) + "\n")


def commit() -> str | None:
    """The commit of the working directory, `+` after it when files differ; None outside git."""
    describe = ["git", "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        found = subprocess.run(describe, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
