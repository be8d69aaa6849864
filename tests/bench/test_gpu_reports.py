"""From the reports of `make gpu` to its table and its plots."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.gpu import plots
from tests.bench.gpu.lines import lines
from tests.bench.gpu.reports import Report, Row, find_row, read_reports
from tests.bench.gpu.table import print_table


def report(part: str, rows: list[Row]) -> Report:
    return Report(part, "llama-8b", "a card", "2.11", 4e12, 1.5, rows)


def step(what: str, batch: int, ms: float, floor: float) -> Row:
    return {
        "what": what, "batch": batch, "step_ms": ms, "floor_ms": floor,
        "times_floor": ms / floor, "tokens_per_s": 1e3 * batch / ms,
    }  # fmt: skip


DECODE = report(
    "decode",
    [
        step("base", 32, 5.0, 4.0),
        step("one shared r16", 32, 6.25, 4.0),
        step("distinct r16", 32, 6.0, 4.8),
        step("half r8 half r64", 32, 8.0, 6.0),
        step("all r36", 32, 7.8, 6.0),
    ],
)


def test_reports_come_back(tmp_path: Path) -> None:
    DECODE.write(tmp_path)
    (tmp_path / "other.json").write_text("[]")
    reports = read_reports(tmp_path)
    assert reports == [DECODE]
    row = find_row(reports, "decode", "llama-8b", what="base", batch=32)
    assert row is not None
    assert row["step_ms"] == 5.0
    assert find_row(reports, "decode", "mistral-7b", what="base") is None


def test_decode_lines_have_targets() -> None:
    found = {line.what: line for line in lines(DECODE)}
    assert found["base B=32"].kept is None
    assert found["base B=32"].target == "<= 1.35"
    assert found["one shared r16 B=32"].kept == pytest.approx(0.8)
    assert found["one shared r16 B=32"].target == ">= 0.92  MISSED"
    assert found["distinct r16 B=32"].target == "<= 1.45, >= 0.8"
    assert found["half r8 half r64 B=32"].target == ">= 0.95"


def test_wrong_answers_void_a_run() -> None:
    answers = {"what": "answers", "checked": 2, "equal": 1, "ties": 0, "wrong": 1, "like_base": 0}
    [line] = lines(report("http", [answers]))
    assert line.target == "VOID"


def test_the_table_keeps_the_order_of_the_parts(capsys: pytest.CaptureFixture[str]) -> None:
    tests = report("tests", [{"what": "tests", "passed": True}])
    print_table([DECODE, report("unknown", []), tests])
    rows = capsys.readouterr().out.split("\n")
    assert rows[1].split() == ["part", "shape", "what", "value", "x", "floor", "kept", "target"]
    assert [row.split()[0] for row in rows[2:5]] == ["tests", "decode", "decode"]


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    DECODE.write(tmp_path)
    row = {"what": "uniform", "batch": 32, "distinct": 4.5, "retention": 0.8}
    report("popularity", [row]).write(tmp_path)
    files = plots.draw(tmp_path)
    assert [file.name for file in files] == ["decode-llama-8b.png", "retention-llama-8b.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
