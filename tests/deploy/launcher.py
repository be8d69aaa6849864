"""A launcher under test: a real process over stand-ins, its output and its diary."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from threading import Condition, Thread
from typing import Any

import psutil

PATIENCE = 60.0  # seconds until a test gives up on something that should happen


class Launcher:
    """Use as a context manager; leaves no process behind whatever the test does."""

    def __init__(
        self, folder: Path, *flags: str, habits: str = "", without_reader: str = ""
    ) -> None:
        self.diary_path = folder / "diary"
        self.diary_path.touch()
        self.sockets = Path(mkdtemp(prefix="lf-"))  # pytest's own folders are too long for sockets
        command = [sys.executable, "-m", "tests.deploy.serve_stand_ins", "--model-id", "stand-in"]
        self.process = subprocess.Popen(
            [*command, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {
                "STAND_IN_DIARY": str(self.diary_path),
                "STAND_IN_HABITS": habits,
                "TMPDIR": str(self.sockets),
            },
        )
        if without_reader:  # "stdout" or "stderr": nobody is at the other end
            getattr(self.process, without_reader).close()
        self.errors = ""
        self._more_errors = Condition()
        self._reader = Thread(target=self._read_errors, daemon=True)
        self._reader.start()

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pid in self.pids().values():
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        rmtree(self.sockets)

    def wait_for_banner(self) -> str:
        """Everything on standard output up to the curl line."""
        assert self.process.stdout is not None
        seen = ""
        for line in self.process.stdout:
            seen += line
            if line.startswith("curl "):
                return seen
        raise AssertionError(f"no banner; standard error:\n{self.errors}")

    def wait_for_error(self, text: str) -> None:
        """Returns once `text` was on standard error."""
        with self._more_errors:
            assert self._more_errors.wait_for(lambda: text in self.errors, PATIENCE), self.errors

    def signal(self, number: signal.Signals) -> None:
        """Sends the launcher, and nobody else, a signal."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """The launcher's exit code, once its standard error has been read."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def diary(self) -> list[dict[str, Any]]:
        """What the stand-ins wrote down, in order."""
        return [json.loads(line) for line in self.diary_path.read_text().splitlines()]

    def entry(self, who: str, what: str = "started") -> dict[str, Any]:
        """The first thing of that kind that `who` wrote down."""
        return next(e for e in self.diary() if (e["who"], e["what"]) == (who, what))

    def pids(self) -> dict[str, int]:
        """Every process the stand-ins told of."""
        return {f"{e['who']} {e['what']}": e["pid"] for e in self.diary() if "pid" in e}

    def survivors(self) -> list[str]:
        """Names of processes that do not end."""
        processes = {
            name: psutil.Process(pid) for name, pid in self.pids().items() if psutil.pid_exists(pid)
        }
        _, alive = psutil.wait_procs(list(processes.values()), timeout=PATIENCE)
        return [name for name, process in processes.items() if process in alive]

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        if self.process.stderr.closed:
            return
        with self.process.stderr as lines:
            for line in lines:
                with self._more_errors:
                    self.errors += line
                    self._more_errors.notify_all()


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
