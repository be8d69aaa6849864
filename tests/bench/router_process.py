"""A router and a fake shard, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

PYTHON = (sys.executable, "-P")


@dataclass(frozen=True, slots=True)
class RouterProcess:
    """A router that answers."""

    url: str
    pid: int


@contextmanager
def router_over_fake_shard(
    shard_flags: Sequence[str] = (), router_flags: Sequence[str] = (), profile: str = ""
) -> Iterator[RouterProcess]:
    """A router; `profile` names a file for cProfile's statistics of the router."""
    fakes = (sys.executable, "-m", "tests.fakes", *shard_flags)
    with _ready(fakes) as shard:
        profiler = ("-m", "cProfile", "-o", profile) if profile else ()
        router = (
            *(*PYTHON, *profiler, "-m", "lorafleet.router", "--port=0", "--hostname=127.0.0.1"),
            *("--adapter-source=local", *router_flags, f"--shards={shard['address']}"),
        )
        with _ready(router) as event:
            yield RouterProcess(event["url"], int(event["pid"]))


@contextmanager
def _ready(command: Sequence[str]) -> Iterator[dict[str, str]]:
    """The ready event of a process that is asked to end, and does with code 0, after the block."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None, "stdin is a pipe"
    assert process.stdout is not None, "stdout is a pipe"
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(command)} ended with code {process.wait()}")
        yield json.loads(line) | {"pid": str(process.pid)}
    finally:
        process.stdin.close()
        process.terminate()
        process.wait(60)
        process.stdout.close()
