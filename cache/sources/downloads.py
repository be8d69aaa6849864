"""Downloads: what every source whose adapters come from elsewhere does with its copies here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lorafleet.cache.disk_tier import DiskTier, Download
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

    def was_read(self, key: AdapterKey) -> bool:
        """Whether the download's adapter was read before, by whichever process."""
        return self._disk.was_read(key)

    def note_read(self, key: AdapterKey) -> None:
        """The download's adapter was read."""
        self._disk.note_read(key)

    def list(self) -> list[tuple[AdapterKey, Path]]:
        """Downloads that are public; the others need their source's word for each caller."""
        return [(d.key, self._disk.path(d.key)) for d in self._mine() if not d.is_restricted]

    def list_restricted(self) -> Sequence[AdapterKey]:
        """The others."""
        return [download.key for download in self._mine() if download.is_restricted]

    def _mine(self) -> Iterator[Download]:
        return iter(self._disk.list(self._source))
