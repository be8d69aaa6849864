"""`python -m tests.bench.gpu --out DIR [PART ...]`: tests and benchmarks of one CUDA device.

Parts: tests; fidelity (a large model's log-probabilities beside float32's); linears, lora
(kernels); decode, prefill, popularity, e6 (the engine's steps); transfers, capacity (adapters on
the move, and many); http, tiers (the whole service), alone (the engine under the load of http);
peers (peft, and the server of --peer-url). decode, prefill and transfers run for every --shape, the
others for the first. `make gpu` installs the checkout beside and calls this. Each part writes
DIR/PART-SHAPE.json; a table of what DIR holds comes last.
"""

from __future__ import annotations

import time
import traceback
from argparse import ArgumentParser
from pathlib import Path

import torch

from tests.bench.gpu import device
from tests.bench.gpu.parts import PARTS, Options
from tests.bench.gpu.reports import Report, read_reports
from tests.bench.gpu.shapes import SHAPES, Shape
from tests.bench.gpu.table import print_table


def main() -> None:
    """Runs the parts that are named, all without names; the code is 1 when one of them failed."""
    parser = ArgumentParser("python -m tests.bench.gpu", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the reports")
    add("--shape", choices=SHAPES, action="append", help="may be repeated (default: llama-8b)")
    add(
        "--e6-tokens", type=int, default=Options.e6_tokens, metavar="N",
        help=f"tokens that e6 generates for each of its 8 cases (default: {Options.e6_tokens})",
    )  # fmt: skip
    add("--peer-url", default="", help="an OpenAI-compatible server to measure beside, in peers")
    add(
        "--limit-seconds", type=float, default=0, metavar="S",
        help="start no part after S seconds; 0 = no limit (default)",
    )  # fmt: skip
    add("parts", nargs="*", choices=[*PARTS, []], help="(default: all)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    options = Options(args.out, args.e6_tokens, args.peer_url.rstrip("/"))
    shapes = [SHAPES[name] for name in args.shape or ["llama-8b"]]
    all_ran = _run_all(args.parts or list(PARTS), shapes, options, args.limit_seconds)
    print_table(read_reports(args.out))
    raise SystemExit(not all_ran)


def _run_all(parts: list[str], shapes: list[Shape], options: Options, limit: float) -> bool:
    started, all_ran = time.perf_counter(), True
    for name in parts:
        for shape in shapes if PARTS[name].per_shape else shapes[:1]:
            if limit and time.perf_counter() - started > limit:
                print(f"{name} {shape.name}: not started after {limit:.0f} s", flush=True)
            else:
                all_ran &= _run(name, shape, options)
    print(f"all parts: {time.perf_counter() - started:.0f} s", flush=True)
    return all_ran


def _run(name: str, shape: Shape, options: Options) -> bool:
    """Whether the part ended well; what it raises is the log's, and the next part's turn comes."""
    if missing := PARTS[name].missing():
        print(f"--- {name} {shape.name}: skipped, not installed: {', '.join(missing)}", flush=True)
        return True
    print(f"--- {name} {shape.name}", flush=True)
    started = time.perf_counter()
    try:
        rows = PARTS[name].run(shape, options)
    except Exception:
        traceback.print_exc()
        return False
    finally:
        device.give_back_memory()
        seconds = time.perf_counter() - started
        print(f"--- {name} {shape.name}: {seconds:.1f} s", flush=True)
    bandwidth = device.copy_bandwidth()
    device.give_back_memory()
    report = Report(name, shape.name, device.name(), torch.__version__, bandwidth, seconds, rows)
    report.write(options.out)
    return True


if __name__ == "__main__":
    main()
