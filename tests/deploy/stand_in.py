"""A stand-in shard or router: the launcher's side of the contract and nothing else.

`python -m tests.deploy.stand_in shard|router FLAGS...` prints the events of the real one, obeys
SIGTERM and ends with its launcher. It writes what happens to it, a JSON object per line, to the
file STAND_IN_DIARY. STAND_IN_HABITS names deviations, e.g. "router:stubborn shard-1:dies_loading":
`stubborn` ignores SIGTERM, `dies_loading` never gets ready, `leaves_child` starts a process that
holds its pipes. SIGUSR1 makes it die with its last words.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from typing import Any

from lorafleet.proto.flags import add_flags
from lorafleet.proto.lifeline import watch_parent
from lorafleet.router.config import RouterConfig
from lorafleet.shard.config import ShardConfig

DEATH_CODE = 7
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
WATCHED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
INFO = {
    "model_id": "stand-in",
    "architecture": "LlamaForCausalLM",
    "dtype": "float32",
    "device": "cpu",
    "num_pages": 512,
    "page_size": 16,
    "arena_bytes": 1 << 30,
    "host_bytes": 1 << 32,
    "num_slots": 64,
    "max_model_len": 2048,
}


class StandIn:
    """One process of the fleet, without the work."""

    def __init__(self, role: str, args: Namespace) -> None:
        self.role = role
        self.args = args
        self.name = f"shard-{args.rank}" if role == "shard" else "router"
        self.habits = _habits(self.name)

    def run(self) -> None:
        """Starts, serves nothing, and ends as its habits say."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        watch_parent(lambda: os._exit(0))
        environment = {name: os.environ.get(name) for name in WATCHED}
        self.note("started", pid=os.getpid(), args=vars(self.args), environment=environment)
        if "leaves_child" in self.habits:
            holder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
            self.note("left", pid=holder.pid)
        if self.role == "shard":
            self._load()
        else:
            event({"event": "ready", "url": f"http://{self.args.hostname}:{self.args.port}"})
        self._obey()
        self.note("finished")

    def _load(self) -> None:
        for done in range(0, 101, 10):
            if self.args.rank == 0:
                event({"event": "loading", "done_bytes": done, "total_bytes": 100})
            if done == 50 and "dies_loading" in self.habits:
                self._die()
        event({"event": "ready", "info": INFO})

    def _obey(self) -> None:
        while signal.sigwait(SIGNALS) != signal.SIGUSR1:
            self.note("asked to stop")
            if "stubborn" not in self.habits:
                return
        self._die()

    def _die(self) -> None:
        for line in range(60):
            print(f"{self.name} last words {line}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(DEATH_CODE)

    def note(self, what: str, **more: Any) -> None:
        """Appends to the diary; one write, so processes do not tear each other's lines."""
        line = json.dumps({"who": self.name, "what": what, **more}) + "\n"
        with open(os.environ["STAND_IN_DIARY"], "ab", buffering=0) as diary:
            diary.write(line.encode())


def event(body: dict[str, Any]) -> None:
    """An event for the launcher."""
    print(json.dumps(body), flush=True)


def _habits(name: str) -> set[str]:
    pairs = (word.split(":") for word in os.environ.get("STAND_IN_HABITS", "").split())
    return {habit for who, habit in pairs if who == name}


def main() -> None:
    """Runs the role named first."""
    role, *flags = sys.argv[1:]
    parser = ArgumentParser()
    add_flags(parser, ShardConfig if role == "shard" else RouterConfig)
    StandIn(role, parser.parse_args(flags)).run()


if __name__ == "__main__":
    main()
