"""Checksum: what a file must hash to, as its source says it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Checksum:
    """`git-sha1` is git's name of a blob, which hashes the size ahead of the content."""

    algorithm: Literal["sha256", "md5", "git-sha1"]
    digest: str  # lower-case hex

    def matches(self, path: Path) -> bool:
        """Whether the file has this content. Raises OSError when it cannot be read."""
        with path.open("rb") as file:
            if self.algorithm == "git-sha1":
                digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
            else:
                digest = hashlib.new(self.algorithm, usedforsecurity=False)
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest() == self.digest
