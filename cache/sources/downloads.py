"""Downloads: what every source whose adapters come from elsewhere does with its copies here."""

from __future__ import annotations

from pathlib import Path

from lorafleet.cache.disk_tier import DiskTier
from lorafleet.proto.messages import AdapterKey


class Downloads:
    """One source's share of the disk tier, which all remote sources have in common."""

    def __init__(self, disk: DiskTier, source: str) -> None:
        """`source`: as keys name it."""
        self._disk, self._source = disk, source

    def disk_bytes(self, key: AdapterKey) -> int:
        """The size of the adapter's files; 0 where there are none."""
        download = self._disk.get(key)
        return download.nbytes if download else 0

    def drop(self, key: AdapterKey) -> None:
        """Deletes the adapter's files."""
        self._disk.drop(key)

    def list(self) -> list[tuple[AdapterKey, Path]]:
        """Downloads that are public; the others need their source's word for each caller."""
        found = [
            d for d in self._disk.list() if d.key.source == self._source and not d.is_restricted
        ]
        return [(download.key, self._disk.path(download.key)) for download in found]
