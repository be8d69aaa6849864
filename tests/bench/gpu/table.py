"""The last lines of `make gpu`: every part in short, beside its floor or base and its target."""

from __future__ import annotations

from collections.abc import Sequence

from tests.bench.gpu.lines import Line, lines
from tests.bench.gpu.parts import PARTS
from tests.bench.gpu.reports import Report

_HEADER = ("part", "shape", "what", "value", "x floor", "kept", "target")


def print_table(reports: Sequence[Report]) -> None:
    """Prints a line for each measurement that says something by itself."""
    order = list(PARTS)
    known = [report for report in reports if report.part in order]
    known.sort(key=lambda report: order.index(report.part))
    rows = [_HEADER, *(_cells(report, line) for report in known for line in lines(report))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip(), flush=True)


def _cells(report: Report, line: Line) -> tuple[str, ...]:
    floor = "" if line.times_floor is None else f"{line.times_floor:.2f}"
    kept = "" if line.kept is None else f"{line.kept:.2f}"
    return (report.part, report.shape, line.what, line.value, floor, kept, line.target)
