"""The real service: `lorafleet serve` as a process, spoken to over HTTP."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

_START_SECONDS = 180
_STOP_SECONDS = 60


class Service:
    """A running service and what a client can ask of it."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.url, self.process, self.log = url, process, log

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric, summed over the label sets that match."""
        with urlopen(f"{self.url}/metrics", timeout=30) as response:
            text = response.read().decode()
        samples = (s for family in text_string_to_metric_families(text) for s in family.samples)
        found = [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]
        assert found, f"no metric {name} {labels} in:\n{text}"
        return sum(found)

    def session(self) -> aiohttp.ClientSession:
        """A client session without a limit on connections."""
        return aiohttp.ClientSession(self.url, connector=aiohttp.TCPConnector(limit=0))


@contextmanager
def serve(model: Path, directory: Path, *flags: str) -> Iterator[Service]:
    """Runs the service for `model` with the given flags; fails unless it ends cleanly."""
    service = start(model, directory, *flags)
    try:
        yield service
        service.process.terminate()
        assert service.process.wait(_STOP_SECONDS) == 0, service.log.read_text()
    finally:
        _kill(service.process)


def start(model: Path, directory: Path, *flags: str) -> Service:
    """Starts the service and waits until it is healthy. Raises AssertionError with its log."""
    port = free_port()
    log = directory / f"serve-{port}.log"
    command = [sys.executable, "-P", "-m", "lorafleet.deploy", "serve", f"--model-id={model}"]
    command += [f"--port={port}", "--hostname=127.0.0.1", "--dtype=float32", *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    service = Service(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_until_healthy(service)
    except AssertionError:
        _kill(process)
        raise
    return service


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_healthy(service: Service) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        assert service.process.poll() is None, service.log.read_text()
        try:
            with urlopen(f"{service.url}/health", timeout=5):
                return
        except URLError:  # not listening yet, or still loading
            pass
        time.sleep(0.1)
    raise AssertionError(f"not healthy in time:\n{service.log.read_text()}")
