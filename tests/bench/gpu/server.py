"""`lorafleet serve` over random weights as a process of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorafleet.deploy.demo.service import running_service
from tests.bench.gpu.checkpoint import write_checkpoint
from tests.bench.gpu.device import DEVICE, ON_CUDA
from tests.bench.gpu.shapes import Shape

# A tiny model on a CPU: float32, so that answers can be compared token by token.
_CPU_FLAGS = ("--dtype", "float32", "--kv-cache-bytes", "64MiB", "--adapter-device-bytes", "64MiB")


@dataclass(frozen=True, slots=True)
class Server:
    """A service that answers; `start_seconds` from starting the process to /health."""

    url: str
    model: str  # as the OpenAI API calls the base model
    vocab_size: int
    start_seconds: float


@contextmanager
def running_server(shape: Shape, folder: Path, flags: Sequence[str] = ()) -> Iterator[Server]:
    """Serves `folder`/model, which it writes, and the adapters of `folder`/adapters."""
    model, adapters = folder / "model", folder / "adapters"
    write_checkpoint(shape, model)
    adapters.mkdir(exist_ok=True)
    given = ["--model-id", str(model), "--load-format", "dummy", "--adapter-root", str(adapters)]
    given += ["--device", DEVICE.type, *(() if ON_CUDA else _CPU_FLAGS), *flags]
    started = time.perf_counter()
    with running_service(given) as url:
        yield Server(url, str(model), shape.vocab_size, time.perf_counter() - started)
