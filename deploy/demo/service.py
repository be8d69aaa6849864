"""The demo's service: `lorafleet serve` as a process of its own, from free port to clean end."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

START_SECONDS = 180.0
STOP_SECONDS = 40.0
NUM_SHARDS = 2


class ServiceFailed(Exception):
    """The service did not start, or did not end well; the message holds its last words."""


@contextmanager
def running_service(flags: Sequence[str]) -> Iterator[str]:
    """Runs `lorafleet serve` with these flags on a free local port inside the block; the URL.

    Raises ServiceFailed when it does not get ready, or does not end with code 0 when asked to.
    """
    port = _free_port()
    command = [sys.executable, "-P", "-m", "lorafleet.deploy", "serve", "--hostname", "127.0.0.1"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), *flags],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_healthy(process, url, log)
            yield url
        finally:
            code = _stop(process)
        if code:
            raise ServiceFailed(f"lorafleet serve ended with code {code}:\n{_tail(log)}")


def demo_flags(folder: Path) -> list[str]:
    """How the demo's model is served on this machine's cores."""
    return [
        *("--model-id", str(folder / "model"), "--adapter-root", str(folder / "adapters")),
        *("--num-shard", str(NUM_SHARDS), "--device", "cpu", "--kv-cache-bytes", "128MiB"),
    ]


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: IO[str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _is_healthy(url):
        if process.poll() is not None:
            raise ServiceFailed(f"lorafleet serve ended before it was ready:\n{_tail(log)}")
        if time.monotonic() > deadline:
            raise ServiceFailed(f"not ready after {START_SECONDS:.0f} s:\n{_tail(log)}")
        time.sleep(0.1)


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> int:
    process.terminate()
    try:
        return process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _tail(log: IO[str]) -> str:
    log.seek(0)
    return log.read()[-4000:]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
