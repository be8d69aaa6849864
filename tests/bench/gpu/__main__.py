"""`python -m tests.bench.gpu --out DIR [PART ...]`: the benchmarks of one CUDA device.

Parts: linears, lora (kernels); decode, prefill (the engine's steps). Each writes DIR/PART.json.
"""

from __future__ import annotations

import gc
import json
import time
from argparse import ArgumentParser
from pathlib import Path

import torch

from lorafleet.kernels import timing
from tests.bench.gpu import kernels, step
from tests.bench.gpu.shapes import SHAPES

PARTS = {
    "linears": lambda shape: kernels.linears(),
    "lora": lambda shape: kernels.lora(),
    "decode": step.decode,
    "prefill": step.prefill,
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
