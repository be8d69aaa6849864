"""`python -m tests.bench.gpu --out DIR [PART ...]`: tests and benchmarks of one CUDA device.

Parts: tests; linears, lora (kernels); decode, prefill (the engine's steps);
transfers, capacity (adapters on the move, and many). `make gpu` installs the
checkout beside and calls this. Each benchmark writes DIR/PART-SHAPE.json.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import torch

from lorafleet.kernels import timing
from tests.bench.gpu import kernels, step, tiers
from tests.bench.gpu.shapes import SHAPES

_TESTS = ("tests/kernels/test_cuda_ops.py", "tests/shard/test_cuda_step.py")
_ROOT = Path(__file__).parents[3]


def _tests(_: str) -> list[dict[str, object]]:
    if importlib.util.find_spec("pytest") is None:
        print("tests: skipped, pytest is not installed", flush=True)
        return []
    # Without the project's pytest plugins, which a GPU image need not have.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", "."]
    done = subprocess.run([*command, "-p", "no:cacheprovider", *_TESTS], cwd=_ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return [{"what": "tests", "passed": True}]


PARTS: dict[str, Callable[[str], list[dict[str, object]]]] = {
    "tests": _tests,
    "linears": lambda shape: kernels.linears(),
    "lora": lambda shape: kernels.lora(),
    "decode": step.decode,
    "prefill": step.prefill,
    "transfers": tiers.transfers,
    "capacity": tiers.capacity,
}


def main() -> None:
    """Runs the parts that are named, all without names."""
    parser = ArgumentParser("python -m tests.bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("parts", nargs="*")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for part in arguments.parts or list(PARTS):
        for shape in arguments.shape or ["llama-8b"]:
            started = time.perf_counter()
            rows = PARTS[part](shape)
            gc.collect()
            torch.cuda.empty_cache()
            report = {
                "part": part,
                "shape": shape,
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "copy_bandwidth": timing.copy_bandwidth(),
                "seconds": time.perf_counter() - started,
                "rows": rows,
            }
            (arguments.out / f"{part}-{shape}.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
