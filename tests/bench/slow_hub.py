"""A hub for benchmarks: `python -m tests.bench.slow_hub ROOT`.

`slow` sends a byte a second, the others as fast as a line of 1 Gbit/s. A real source works on a
machine of its own: this one reads from mapped files and hashes nothing while others are timed.
"""

from __future__ import annotations

import os
import sys
from functools import cache, cached_property
from mmap import MAP_POPULATE, MAP_SHARED, PROT_READ, mmap
from pathlib import Path

from tests.cache.hub_stand_in import Hub, Repo

_LINE_BYTES = 125e6  # a second


class SteadyRepo(Repo):
    """A repository that does not change, so that nothing is read or hashed twice."""

    @cached_property
    def commit(self) -> str:
        """Of its name."""
        return self.directory.name.encode().hex().ljust(40, "0")

    def read(self, path: Path) -> tuple[memoryview, str]:
        """A file's content and ETag, for all repositories that link to the file."""
        return _read(path.resolve())


@cache
def _read(path: Path) -> tuple[memoryview, str]:
    with path.open("rb") as file:
        content = mmap(file.fileno(), 0, MAP_SHARED | MAP_POPULATE, PROT_READ)
    return memoryview(content), f'"{len(content):x}"'


def main(root: Path) -> None:
    """Serves ROOT/owner/name until stdin ends, when nobody else wants the processor."""
    os.nice(19)
    hub = Hub()
    for directory in root.glob("*/*"):
        is_slow = directory.parent.name == "slow"
        repo = SteadyRepo(
            directory,
            trickle_seconds=float(is_slow),
            bytes_per_second=_LINE_BYTES,
            has_checksums=False,
        )
        for path in directory.iterdir():
            repo.read(path)  # now, and not while others are timed
        hub.repos[directory.relative_to(root).as_posix()] = repo
    with hub.serve():
        print(hub.endpoint, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
