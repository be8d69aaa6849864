"""A report in lines of the table: what a reader wants of each part, and the project's targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tests.bench.gpu.reports import Report, Row

# Share of base-only speed that a decode step keeps, by what and batch.
_KEPT = {("one shared r16", 32): 0.92, ("distinct r16", 32): 0.80}
_TIMES_FLOOR = {"base": 1.35, "distinct r16": 1.45}
_SHOWN_KERNEL_BATCHES = (1, 32)


@dataclass(frozen=True, slots=True)
class Target:
    """A bound of the project's, and whether a value keeps it."""

    bound: float
    at_most: bool

    def judge(self, value: float) -> str:
        """As the table shows it."""
        met = value <= self.bound if self.at_most else value >= self.bound
        return f"{'<=' if self.at_most else '>='} {self.bound:g}{'' if met else '  MISSED'}"


@dataclass(frozen=True, slots=True)
class Line:
    """One measurement; `kept` is the share of base-only speed, or whatever else should stay 1."""

    what: str
    value: str
    times_floor: float | None = None
    kept: float | None = None
    target: str = ""


def lines(report: Report) -> list[Line]:
    """The lines of one report; none for a part that the table does not know."""
    describe = _PARTS.get(report.part)
    return list(describe(report.rows)) if describe else []


def _tests(rows: Sequence[Row]) -> Iterator[Line]:
    for row in rows:
        yield Line(row["what"], "passed" if row["passed"] else "FAILED")


def _fidelity(rows: Sequence[Row]) -> Iterator[Line]:
    for row in rows:
        target = ""
        if "over_bf16" in row:
            target = Target(1.25, at_most=True).judge(row["over_bf16"])
        yield Line(row["what"], f"{row['rms']:.4f} nats rms, {row['most']:.3f} most", target=target)


def _kernels(rows: Sequence[Row]) -> Iterator[Line]:
    for row in rows:
        if row["batch"] in _SHOWN_KERNEL_BATCHES:
            what = f"r{row['rank']} {row['popularity']} B={row['batch']}"
            yield Line(what, f"{row['sum_us']:.0f} us a layer", row["times_floor"])


def _decode(rows: Sequence[Row]) -> Iterator[Line]:
    steps = {(row["what"], row["batch"]): row["step_ms"] for row in rows}
    for row in rows:
        what, batch, over = row["what"], row["batch"], row["times_floor"]
        beside = ("all r36" if what == "half r8 half r64" else "base", batch)
        kept = None if what == "base" else steps[beside] / row["step_ms"]
        targets = []
        if what in _TIMES_FLOOR:
            targets.append(Target(_TIMES_FLOOR[what], at_most=True).judge(over))
        if what == "half r8 half r64" and kept is not None:
            targets.append(Target(0.95, at_most=False).judge(kept))
        if (what, batch) in _KEPT and kept is not None:
            targets.append(Target(_KEPT[what, batch], at_most=False).judge(kept))
        value = f"{row['step_ms']:.2f} ms"
        yield Line(f"{what} B={batch}", value, over, kept, ", ".join(targets))


def _prefill(rows: Sequence[Row]) -> Iterator[Line]:
    for row in rows:
        is_base = row["what"] == "prefill base"
        target = "" if is_base else Target(0.95, at_most=False).judge(row["of_base"])
        kept = None if is_base else row["of_base"]
        yield Line(row["what"], f"{row['ms']:.1f} ms", None, kept, target)


def _transfers(rows: Sequence[Row]) -> Iterator[Line]:
    for row in rows:
        steps = row["steps_until_ready"]
        yield Line(
            f"r16 from host, {row['megabytes']:.0f} MB",
            f"{steps} steps",
            target=Target(2, at_most=True).judge(steps),
        )
        over = row["busy_over_quiet"]
        yield Line(
            "others' step", f"x{over:.3f} of quiet", target=Target(1.02, at_most=True).judge(over)
        )


def _capacity(rows: Sequence[Row]) -> Iterator[Line]:
    few = rows[0]["step_ms"] if rows else 0.0
    for row in rows:
        kept = few / row["step_ms"]
        many = row is not rows[0]
        target = Target(0.95, at_most=False).judge(kept) if many else ""
        what = f"{row['registered']} registered"
        yield Line(what, f"{row['step_ms']:.2f} ms", None, kept if many else None, target)


def _http(rows: Sequence[Row]) -> Iterator[Line]:
    for row in rows:
        if row["what"] == "start-up":
            yield Line("start-up", f"{row['seconds']:.1f} s")
        elif row["what"] == "answers":
            good = "" if not row["wrong"] and not row["like_base"] else "VOID"
            value = f"{row['equal']} equal, {row['ties']} ties, {row['wrong']} wrong"
            yield Line(f"{row['checked']} answers alone", value, target=good)
        else:
            yield from _streams(row)


def _streams(row: Row) -> Iterator[Line]:
    what, retention = row["what"], row.get("retention")
    yield Line(what, f"{row['tokens_per_s']:,.0f} tokens/s", None, retention)
    first = f"{row['ttft_p50_ms']:.0f} / {row['ttft_p99_ms']:.0f}"
    gaps = f"{row['inter_token_p50_ms']:.2f} / {row['inter_token_p99_ms']:.2f}"
    yield Line(f"{what}, p50/p99", f"first token {first}, then {gaps} ms")
    if "of_engine" in row:
        target = Target(0.95, at_most=False).judge(row["of_engine"])
        alone = f"{row['engine_tokens_per_s']:,.0f} tokens/s"
        yield Line(f"{what}, engine alone", alone, None, row["of_engine"], target)


def _e6(rows: Sequence[Row]) -> Iterator[Line]:
    for row in rows:
        yield Line(
            f"{row['what']}, {row['adapters']} adapters",
            f"{row['seconds']:.1f} s, x{row['ratio']:.2f} of one",
            None,
            1 / row["ratio"],
        )


def _popularity(rows: Sequence[Row]) -> Iterator[Line]:
    for row in rows:
        is_base = row["what"] == "base"
        yield Line(
            f"{row['what']} B={row['batch']}, {row['distinct']:.1f} adapters",
            f"{row['tokens_per_s']:,.0f} tokens/s",
            row["times_floor"],
            None if is_base else row["retention"],
        )


def _tiers(rows: Sequence[Row]) -> Iterator[Line]:
    for row in rows:
        over = f" ({row['over_device_ms']:+.1f})" if row["what"] in ("host", "disk") else ""
        what = "no adapter" if row["what"] == "none" else f"r{row['rank']} on {row['what']}"
        yield Line(f"{what}, first token", f"{row['ttft_ms']:.1f} ms{over}")
        gap = f"{row['others_ms']:.2f} ms, x{row['others_over_quiet']:.2f} of quiet"
        yield Line(f"{what}, others' gap", gap, target=_others_target(row))


def _others_target(row: Row) -> str:
    """Beside an adapter that was on the device: a prompt costs the others something anyway."""
    others = row.get("others_over_device")
    if row["what"] != "host" or others is None:
        return ""
    return f"x{others:.2f} of device, {Target(1.02, at_most=True).judge(others)}"


def _peers(rows: Sequence[Row]) -> Iterator[Line]:
    for row in rows:
        if "step_ms" in row:
            ours = f", x{row['times_ours']:.1f} of ours" if "times_ours" in row else ""
            yield Line(f"{row['what']} B={row['batch']}", f"{row['step_ms']:.1f} ms{ours}")
        else:
            yield from _streams(row)


_PARTS: dict[str, Callable[[Sequence[Row]], Iterator[Line]]] = {
    "tests": _tests,
    "lora": _kernels,
    "decode": _decode,
    "prefill": _prefill,
    "transfers": _transfers,
    "capacity": _capacity,
    "fidelity": _fidelity,
    "http": _http,
    "e6": _e6,
    "popularity": _popularity,
    "tiers": _tiers,
    "peers": _peers,
}
