"""The parts of `make gpu` by name."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bench.gpu import (
    cold_tiers,
    fidelity,
    kernels,
    mixed_decode,
    over_http,
    peers,
    same_load,
    step,
    tiers,
)
from tests.bench.gpu.reports import Row
from tests.bench.gpu.shapes import Shape
from tests.bench.gpu.streams import Load

_TESTS = (
    "tests/kernels/test_cuda_ops.py", "tests/shard/test_cuda_step.py",
    "tests/shard/test_cuda_prompt_graphs.py", "tests/shard/test_cuda_parts.py",
    "tests/e2e/test_two_gpus.py",
)  # fmt: skip
_ROOT = Path(__file__).parents[3]
_SERVICE = ("aiohttp", "grpc_health", "grpc_reflection", "prometheus_client", "tokenizers")


@dataclass(frozen=True)
class Options:
    """What the command line says to the parts."""

    out: Path
    e6_tokens: int = 65_536
    peer_url: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """`run` measures one shape; a part that is not `per_shape` runs for the first one only."""

    run: Callable[[Shape, Options], list[Row]]
    per_shape: bool = False
    needs: tuple[str, ...] = ()  # modules

    def missing(self) -> list[str]:
        """What it needs and is not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def _tests(shape: Shape, options: Options) -> list[Row]:
    # Without the project's pytest plugins, which a GPU image need not have.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", "."]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", "4", "--dist", "worksteal"]
    done = subprocess.run([*command, "-p", "no:cacheprovider", *_TESTS], cwd=_ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return [{"what": "tests", "passed": True}]


def _peers(shape: Shape, options: Options) -> list[Row]:
    rows = peers.peft_steps(shape, options.out)
    return rows + (peers.other_server(shape, options.peer_url, Load()) if options.peer_url else [])


PARTS: dict[str, Part] = {
    "tests": Part(_tests, needs=("pytest",)),
    "fidelity": Part(lambda shape, options: fidelity.fidelity(shape)),
    "linears": Part(lambda shape, options: kernels.linears()),
    "lora": Part(lambda shape, options: kernels.lora()),
    "decode": Part(lambda shape, options: step.decode(shape.name), per_shape=True),
    "prefill": Part(lambda shape, options: step.prefill(shape.name), per_shape=True),
    "transfers": Part(lambda shape, options: tiers.transfers(shape.name), per_shape=True),
    "capacity": Part(lambda shape, options: tiers.capacity(shape.name)),
    "alone": Part(lambda shape, options: same_load.engine_alone(shape)),
    "http": Part(lambda shape, options: over_http.over_http(shape, options.out), needs=_SERVICE),
    "e6": Part(lambda shape, options: mixed_decode.over_adapters(shape, options.e6_tokens)),
    "popularity": Part(lambda shape, options: mixed_decode.popularity(shape)),
    "tiers": Part(lambda shape, options: cold_tiers.tiers(shape), needs=_SERVICE),
    "peers": Part(_peers),
}
