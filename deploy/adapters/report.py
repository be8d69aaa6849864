"""Adapters and verdicts as tables."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lorafleet.deploy.adapters.verdict import Verdict

_MIB = 1 << 20


def print_adapters(console: Console, adapters: Sequence[dict[str, Any]]) -> None:
    """What operators look for first in the management API's answer; --json has the rest."""
    table = _table("adapter", "rank", "MiB", "tier", "pinned", "aliases", "requests", "last use")
    for adapter in adapters:
        revision = f"@{adapter['revision']}" if adapter["revision"] else ""
        table.add_row(
            adapter["id"] + revision,
            _or_dash(adapter["rank"]),
            _mib(adapter["bytes"]),
            adapter["tier"],
            _or_dash(adapter["pinned"]),
            " ".join(adapter["aliases"]),
            str(adapter["requests"]),
            _ago(adapter["last_used_at"]),
        )
    console.print(table)


def print_verdicts(console: Console, verdicts: Sequence[Verdict]) -> None:
    """What would become of folders; a refusal's whole sentence stands below."""
    table = _table("folder", "verdict", "rank", "modules", "MiB a shard", "digest")
    for verdict in verdicts:
        table.add_row(
            verdict.path,
            "served" if verdict.is_served else "refused",
            _or_dash(verdict.rank),
            _or_dash(verdict.num_modules),
            _mib(verdict.packed_bytes),
            verdict.digest[:12] or "-",
        )
    console.print(table)
    for verdict in verdicts:
        if not verdict.is_served:
            console.print(f"{verdict.path}: {verdict.reason}", markup=False, soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:  # ids and paths are long; only they may take several lines
        table.add_column(column, overflow="fold", no_wrap=column != columns[0])
    return table


def _mib(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / _MIB:.2f}"


def _or_dash(value: Any) -> str:
    return str(value) if value else "-"


def _ago(at: float | None) -> str:
    return "-" if at is None else f"{max(0.0, time.time() - at):.0f} s ago"
