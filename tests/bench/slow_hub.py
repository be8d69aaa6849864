"""A hub for benchmarks: `python -m tests.bench.slow_hub ROOT`; `slow` sends a byte a second."""

from __future__ import annotations

import os
import sys
from functools import cached_property
from pathlib import Path

from tests.cache.hub_stand_in import Hub, Repo


class SteadyRepo(Repo):
    """A repository that does not change, so that nothing is hashed while others are timed."""

    @cached_property
    def commit(self) -> str:
        """Of its name."""
        return self.directory.name.encode().hex().ljust(40, "0")


def main(root: Path) -> None:
    """Serves ROOT/owner/name until stdin ends, when nobody else wants the processor."""
    os.nice(19)
    hub = Hub()
    for directory in root.glob("*/*"):
        is_slow = directory.parent.name == "slow"
        repo = SteadyRepo(directory, trickle_seconds=float(is_slow), has_checksums=False)
        hub.repos[directory.relative_to(root).as_posix()] = repo
    with hub.serve():
        print(hub.endpoint, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
