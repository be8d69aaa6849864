"""`python -m tests.bench.gpu.plots --out DIR`: PNGs made from the reports in DIR.

decode-SHAPE.png: a decode step's time against the batch, beside the floor. retention-SHAPE.png:
the share of base-only speed against the distinct adapters of a step. Needs matplotlib.
"""

from __future__ import annotations

import importlib.util
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.gpu.popularity import LAWS
from tests.bench.gpu.reports import Report, Row, read_reports
from tests.bench.gpu.shapes import SHAPES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (7.0, 4.5)  # inches
_CONTEXT = 512 + 24  # tokens of a row, on average, in the decode part
_RANK = 16
_DECODE_LINES = ("base", "one shared r16", "distinct r16", "distinct r64")
_ADAPTERS = {"one shared r16": 1, "32 distinct r16": 32, "distinct r16": 0}  # 0 = one a row
_BATCHES = {32: "tab:blue", 64: "tab:orange"}


def main() -> None:
    """Draws what there are reports for, and says what it wrote."""
    parser = ArgumentParser("python -m tests.bench.gpu.plots", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    if importlib.util.find_spec("matplotlib") is None:
        print("plots: skipped, matplotlib is not installed")
        return
    for file in draw(out):
        print(f"wrote {file}")


def draw(out: Path) -> list[Path]:
    """Writes the PNGs into `out`; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    reports = read_reports(out)
    files = []
    for shape in sorted({report.shape for report in reports}):
        decode = next((r for r in reports if (r.part, r.shape) == ("decode", shape)), None)
        mixed = next((r for r in reports if (r.part, r.shape) == ("popularity", shape)), None)
        if decode:
            files.append(_decode(decode, out / f"decode-{shape}.png"))
        if decode or mixed:
            found = [report for report in (decode, mixed) if report]
            files.append(_retention(found, out / f"retention-{shape}.png"))
    return files


def _decode(report: Report, file: Path) -> Path:
    axes = _axes(f"{report.shape}, decode step, context 512 ({report.device})")
    for what in _DECODE_LINES:
        rows = sorted((r for r in report.rows if r["what"] == what), key=lambda r: r["batch"])
        if not rows:
            continue
        batches = [row["batch"] for row in rows]
        [line] = axes.plot(batches, [row["step_ms"] for row in rows], "o-", label=what)
        axes.plot(batches, [row["floor_ms"] for row in rows], "--", color=line.get_color())
    axes.plot([], [], "--", color="gray", label="floor: bytes over copy bandwidth")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row["batch"] for row in report.rows}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("rows in the batch")
    axes.set_ylabel("ms a step")
    return _save(axes, file)


def _retention(reports: Sequence[Report], file: Path) -> Path:
    axes = _axes(f"{reports[0].shape}, rank {_RANK} all-linear ({reports[0].device})")
    for batch, color in _BATCHES.items():
        points = [_point(report, row) for report in reports for row in _mixed(report, batch)]
        if not points:
            continue
        steps = [point[:2] for point in sorted(points) if point[2] == "decode"]
        loops = [point[:2] for point in sorted(points) if point[2] == "popularity"]
        if steps:
            axes.plot(*zip(*steps, strict=True), "o-", color=color, label=f"B = {batch}, steps")
        if loops:
            label = f"B = {batch}, closed loop under Punica's laws"
            axes.plot(*zip(*loops, strict=True), "x", color=color, label=label)
        counts = list(range(batch + 1))
        floors = [_floor(reports[0].shape, batch, count) for count in counts]
        axes.plot(counts, floors, "--", color=color)
    axes.plot([], [], "--", color="gray", label="what the bytes allow, context 512")
    axes.set_xlabel("distinct adapters in a step")
    axes.set_ylabel("share of base-only tokens/s")
    axes.set_ylim(0, 1.05)
    return _save(axes, file)


def _mixed(report: Report, batch: int) -> list[Row]:
    """A report's rows of this batch with rank-16 adapters."""
    kinds = LAWS if report.part == "popularity" else _ADAPTERS
    return [row for row in report.rows if row["batch"] == batch and row["what"] in kinds]


def _point(report: Report, row: Row) -> tuple[float, float, str]:
    """Distinct adapters, share of base only, and the part that measured it."""
    if report.part == "popularity":
        return row["distinct"], row["retention"], report.part
    base = next(
        each["step_ms"]
        for each in report.rows
        if (each["what"], each["batch"]) == ("base", row["batch"])
    )
    count = _ADAPTERS[row["what"]] or int(row["batch"])
    return count, base / row["step_ms"], report.part


def _floor(shape: str, batch: int, adapters: int) -> float:
    """The share that bytes alone allow; the bandwidth cancels out."""
    model = SHAPES[shape]
    base = model.floor_ms(batch, _CONTEXT, 0, 0, 1.0)
    return base / model.floor_ms(batch, _CONTEXT, adapters, _RANK, 1.0)


def _axes(title: str) -> Axes:
    from matplotlib.figure import Figure

    axes = Figure(figsize=_SIZE, layout="constrained").subplots()
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    return axes


def _save(axes: Axes, file: Path) -> Path:
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.savefig(file, dpi=150)
    return file


if __name__ == "__main__":
    main()
